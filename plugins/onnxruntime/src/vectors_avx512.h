// The vector operations of AVX-512 (F, BW, VL, DQ), 16 lanes, except for the products of int8. Included by the kernels files.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

using Floats = __m512;
using Ints = __m512i;
constexpr int64_t kLanes = 16, kVectors = 1;
constexpr int kFloatRows = 8, kUnpackingRows = 8;
constexpr int float_panels(int rows, bool) { return rows <= 4 ? 4 : 2; }
// Measured on Zen 4: the processor's prefetcher is best as long as 64 bytes need few instructions. It stops at the end
// of a 4 KiB page, so the beginning of the page after the next one is prefetched.
template <int, int instructions>
inline void prefetch(const uint8_t* line) {
  if (instructions > 4) {
    __builtin_prefetch(line + 4096, 0, 2);
    __builtin_prefetch(line + 1024);
  } else if (reinterpret_cast<uintptr_t>(line) % 4096 == 0) {
    __builtin_prefetch(line + 8192, 0, 2);
  }
}

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats set(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Lane i: the sum of v[i]. First in every quarter of the register, then over the quarters.
inline Floats sum_pairs(Floats a, Floats b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
inline Floats sum_fours(const Floats* v) {
  const __m512d a = _mm512_castps_pd(sum_pairs(v[0], v[1])), b = _mm512_castps_pd(sum_pairs(v[2], v[3]));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}
inline Floats sum_quarters(Floats a, Floats b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
inline Floats sum_each(const Floats (&v)[kLanes]) {
  return sum_quarters(sum_quarters(sum_fours(v), sum_fours(v + 4)), sum_quarters(sum_fours(v + 8), sum_fours(v + 12)));
}
inline Floats load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats load_bfloat(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline Ints load_ints(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint8_t* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Ints set(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints spread(const uint8_t* four) {
  int32_t word;
  memcpy(&word, four, sizeof word);
  return set(word);
}
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
// Moves byte j of each word to the top, followed by zeros.
inline Ints top_byte(Ints v, int j) {
  const Ints top = _mm512_set1_epi32(static_cast<int32_t>(0xff000000u));
  return _mm512_and_si512(_mm512_sll_epi32(v, _mm_cvtsi32_si128(24 - 8 * j)), top);
}
// The number in a table of 16 for each byte, which is its place.
inline Ints look_up(const int8_t (&table)[16], Ints places) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), places);
}
// 2^(e - 127) for kLanes bytes e; 0 instead of 2^-127.
inline Floats load_powers(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 23));
}
// The numbers whose float8_e4m3fn codes are the top bytes. The bits of a code, moved to those of fp32, are 2^-120 times the number.
inline Floats from_e4m3(Ints top) {
  const Ints bits = _mm512_and_si512(_mm512_srai_epi32(top, 4), _mm512_set1_epi32(static_cast<int32_t>(0x87f00000u)));
  return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
}
// Every byte n bits lower; its upper bits may be those of the next byte.
constexpr bool kShiftsBytes = false;
template <int n>
inline Ints shift_right(Ints v) {
  return _mm512_srli_epi16(v, n);
}
// The numbers whose codes are `bits` bits (2 or 3) of each word, from bit `first` on: the codes less half of their range.
template <int bits>
inline Floats numbers_in(Ints words, int first) {
  const Ints codes = _mm512_srl_epi32(words, _mm_cvtsi32_si128(first));
  const Floats numbers = bits == 2 ? _mm512_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1)
                                   : _mm512_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3);
  return _mm512_permutexvar_ps(codes, numbers);  // by the lowest 4 bits
}

// Two columns of 16-bit numbers, one after the other, as pairs: the numbers of a row stand together.
inline Ints paired(Ints columns) {
  alignas(64) static constexpr uint16_t kPlaces[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), columns);
}

}  // namespace
