// AVX2: an instruction multiplies an unsigned and a signed byte and sums pairs of products in 16 bits.
#include "vectors_avx2.h"

namespace {

constexpr int32_t kInt8Offset = 0;  // left in the weights that dot_int8 multiplies
constexpr int kQuantizedRows = 4;
constexpr int quantized_panels(int rows, int instructions) { return rows > 1 ? 1 : instructions == 1 ? 4 : 2; }

// Adds in the order of the source. GCC 12 would multiply for all sums first, and run out of registers.
inline Ints in_order(Ints sum) {
  asm("" : "+x"(sum));
  return sum;
}

// A pair of products of int4 and int8 is at most 2 * 15 * 127 in magnitude, so 16 bits hold the sum of eight pairs.
constexpr int kPartialColumns = 32;
struct Partial {
  __m256i words = _mm256_setzero_si256();
};
inline Partial dot_int4(Partial sum, Ints weights, Ints x) {
  return {in_order(_mm256_add_epi16(sum.words, _mm256_maddubs_epi16(weights, x)))};
}
inline Ints widen(Ints sum, Partial partial) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(partial.words, _mm256_set1_epi16(1)));
}
// The instruction needs one unsigned operand, so the weight's sign is moved to x. A pair is at most 2 * 128 * 127, which fits.
inline Ints dot_int8(Ints sum, Ints weights, Ints x) {
  const Ints w = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
  const Ints words = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1))));
}

}  // namespace

#define RQ_KERNELS kAvx2Kernels
#define RQ_KERNELS_NAME "avx2"
#include "kernels_body.h"
