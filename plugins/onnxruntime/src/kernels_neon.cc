// 64-bit ARM without instructions for dot products: products of bytes in 16 bits.
#include "vectors_neon.h"

namespace {

constexpr int32_t kInt8Offset = 0;  // left in the weights that dot_int8 multiplies
constexpr int kQuantizedRows = 2;
constexpr int kDotInstructions = 5;  // of dot_int8
constexpr int quantized_panels(int, int) { return 1; }

// A product of int4 and int8 is at most 15 * 127 in magnitude, so 16 bits hold the sum of sixteen, of every fourth column.
constexpr int kPartialColumns = 64;
struct Partial {
  int16x8_t low = vdupq_n_s16(0), high = vdupq_n_s16(0);  // of the lower and the upper two words
};
inline Partial dot_int4(Partial sum, Ints weights, Ints x) {
  const int8x16_t w = vreinterpretq_s8_s32(weights), bytes = vreinterpretq_s8_s32(x);
  return {vmlal_s8(sum.low, vget_low_s8(w), vget_low_s8(bytes)), vmlal_high_s8(sum.high, w, bytes)};
}
inline Ints widen(Ints sum, Partial partial) {
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(partial.low), vpaddlq_s16(partial.high)));
}
// A pair of products is at most 2 * 128 * 127, which fits into 16 bits.
inline Ints dot_int8(Ints sum, Ints weights, Ints x) {
  const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(weights), vdupq_n_u8(128)));
  const int8x16_t bytes = vreinterpretq_s8_s32(x);
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(bytes)), high = vmull_high_s8(w, bytes);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
}

}  // namespace

#define RQ_KERNELS kNeonKernels
#define RQ_KERNELS_NAME "neon"
#include "kernels_body.h"
