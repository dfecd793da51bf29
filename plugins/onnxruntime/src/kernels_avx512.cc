// AVX-512 (F, BW, VL, DQ): 16 lanes.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

using Vector = __m512;
constexpr int64_t kWidth = 16, kRows = 6, kColumns = 4;

inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
inline Vector load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vector load_bfloat(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// q * scale - zero_point * scale in one fma: the product with the zero point, a power of two, is exact.
inline Vector scaled(__m128i bytes, float scale, float zero_point) {
  const Vector q = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  return _mm512_fmadd_ps(q, _mm512_set1_ps(scale), _mm512_set1_ps(-zero_point * scale));
}
inline Vector load_int8(const uint8_t* p, float scale) {
  return scaled(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), scale, 128.0f);
}
inline Vector load_int4(const uint8_t* p, float scale) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(bytes, mask), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return scaled(_mm_unpacklo_epi8(even, odd), scale, 8.0f);
}

}  // namespace

#define RQ_KERNELS kAvx512Kernels
#define RQ_KERNELS_NAME "avx512"
#include "kernels_body.h"
