// AVX2, FMA and F16C: 8 lanes.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

using Vector = __m256;
constexpr int64_t kWidth = 8, kRows = 3, kColumns = 4;

inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vector v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline Vector load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vector load_bfloat(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
// q * scale - zero_point * scale in one fma: the product with the zero point, a power of two, is exact.
inline Vector scaled(__m128i bytes, float scale, float zero_point) {
  const Vector q = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  return _mm256_fmadd_ps(q, _mm256_set1_ps(scale), _mm256_set1_ps(-zero_point * scale));
}
inline Vector load_int8(const uint8_t* p, float scale) {
  return scaled(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), scale, 128.0f);
}
inline Vector load_int4(const uint8_t* p, float scale) {
  int32_t word;
  memcpy(&word, p, sizeof word);
  const __m128i bytes = _mm_cvtsi32_si128(word), mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(bytes, mask), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return scaled(_mm_unpacklo_epi8(even, odd), scale, 8.0f);
}

}  // namespace

#define RQ_KERNELS kAvx2Kernels
#define RQ_KERNELS_NAME "avx2"
#include "kernels_body.h"
