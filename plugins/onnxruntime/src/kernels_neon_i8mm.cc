// 64-bit ARM with products of int8 matrices: one instruction multiplies 2 rows of weights by 2 rows of x, 8 columns of each.
#include "vectors_neon.h"

#define RQ_MATRIX_PRODUCTS

namespace {

constexpr int32_t kInt8Offset = 128;
constexpr int kQuantizedRows = 4;
constexpr int kDotInstructions = 1;
constexpr int quantized_panels(int rows, int) { return rows == 1 ? 2 : 1; }

using Partial = Ints;
constexpr int kPartialColumns = 1024;  // of any block
inline Ints dot_int8(Ints sum, Ints weights, Ints x) {
  return vusdotq_s32(sum, vreinterpretq_u8_s32(weights), vreinterpretq_s8_s32(x));
}
inline Ints dot_int4(Ints sum, Ints weights, Ints x) { return dot_int8(sum, weights, x); }

// The dot products of 8 columns of weight rows a and b with rows x and y: ax, ay, bx, by.
inline Ints multiply_matrices(Ints sum, Ints weights, Ints x) {
  return vusmmlaq_s32(sum, vreinterpretq_u8_s32(weights), vreinterpretq_s8_s32(x));
}
inline Ints pair_of_rows(const uint8_t* x, const uint8_t* y) { return vreinterpretq_s32_u8(vcombine_u8(vld1_u8(x), vld1_u8(y))); }
inline Ints zip_low(Ints a, Ints b) { return vzip1q_s32(a, b); }
inline Ints zip_high(Ints a, Ints b) { return vzip2q_s32(a, b); }
inline Ints even_words(Ints a, Ints b) { return vuzp1q_s32(a, b); }
inline Ints odd_words(Ints a, Ints b) { return vuzp2q_s32(a, b); }

}  // namespace

#include "quantized_body.h"

const rq::QuantizedProducts rq::kNeonI8mmQuantized = multiply_quantized;
