// AVX2, FMA and F16C: 8 lanes.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

using Floats = __m256;
using Ints = __m256i;
constexpr int64_t kLanes = 8, kVectors = 2;
constexpr int kFloatRows = 6, kInt4Rows = 2, kInt8Rows = 4;
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats set(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Floats load_bfloat(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline Ints load_ints(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints set(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints spread(const uint8_t* four) {
  int32_t word;
  memcpy(&word, four, sizeof word);
  return set(word);
}
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
template <int bits>
inline Ints field(Ints v, int shift) {
  return _mm256_and_si256(_mm256_srli_epi32(v, shift), _mm256_set1_epi32((1 << bits) - 1));
}
inline Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }

// Two products of int4 and int8 are at most 2 * 15 * 127 in magnitude: 16 bits hold the sum of eight such pairs.
struct Partial {
  __m256i words = _mm256_setzero_si256();
};
inline Partial dot(Partial sum, Ints weights, Ints x) {
  return {_mm256_add_epi16(sum.words, _mm256_maddubs_epi16(weights, x))};
}
inline Ints widen(Ints sum, Partial partial) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(partial.words, _mm256_set1_epi16(1)));
}
inline Ints even_bytes(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
inline Ints odd_bytes(Ints v) { return _mm256_srli_epi16(v, 8); }
inline Ints add_words(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
inline Ints dot_words(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

}  // namespace

#define RQ_KERNELS kAvx2Kernels
#define RQ_KERNELS_NAME "avx2"
#define RQ_INT8_PRODUCTS "int8_words.h"
#include "kernels_body.h"
