// 64-bit ARM with dot products: one instruction sums four products of signed bytes.
#include "vectors_neon.h"

namespace {

constexpr int32_t kInt8Offset = 0;
constexpr int kQuantizedRows = 4;
constexpr int kDotInstructions = 1;
constexpr int quantized_panels(int rows, int) { return rows == 1 ? 2 : 1; }

using Partial = Ints;
constexpr int kPartialColumns = 1024;  // of any block
inline Ints dot_int8(Ints sum, Ints weights, Ints x) {
  const uint8x16_t w = veorq_u8(vreinterpretq_u8_s32(weights), vdupq_n_u8(128));
  return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_s32(x));
}
inline Ints dot_int4(Ints sum, Ints weights, Ints x) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(x));
}

}  // namespace

#include "quantized_body.h"

const rq::QuantizedProducts rq::kNeonDotprodQuantized = multiply_quantized;
