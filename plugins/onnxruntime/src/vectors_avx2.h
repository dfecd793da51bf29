// The vector operations of AVX2, FMA and F16C, 8 lanes, except for the products of int8. Included by the kernels files.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

using Floats = __m256;
using Ints = __m256i;
constexpr int64_t kLanes = 8, kVectors = 2;
constexpr int kFloatRows = 6, kUnpackingRows = 4;  // rows of x at a time: as many as fit into the registers
constexpr int float_panels(int rows, bool converted) { return rows == 1 ? 4 : rows <= (converted ? 2 : 3) ? 2 : 1; }
constexpr int kDotInstructions = 1;  // does not matter: see prefetch
// In a single panel, the processor's prefetcher stops at every page; in several, it keeps up, and must not be overtaken.
template <int panels, int>
inline void prefetch(const uint8_t* line) {
  __builtin_prefetch(line + (panels == 1 ? 4096 : panels == 2 ? 1024 : 512));
}

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats set(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// Lane i: the sum of v[i].
inline Floats sum_each(const Floats (&v)[kLanes]) {
  const Floats low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));  // of the halves of v[0] to v[3]
  const Floats high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
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
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
// Moves byte j of each word to the top, followed by zeros.
inline Ints top_byte(Ints v, int j) {
  alignas(16) static constexpr int8_t kPlaces[4][16] = {{-1, -1, -1, 0, -1, -1, -1, 4, -1, -1, -1, 8, -1, -1, -1, 12},
                                                        {-1, -1, -1, 1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13},
                                                        {-1, -1, -1, 2, -1, -1, -1, 6, -1, -1, -1, 10, -1, -1, -1, 14},
                                                        {-1, -1, -1, 3, -1, -1, -1, 7, -1, -1, -1, 11, -1, -1, -1, 15}};
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kPlaces[j]))));
}
// The number in a table of 16 for each byte, which is its place.
inline Ints look_up(const int8_t (&table)[16], Ints places) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), places);
}
// 2^(e - 127) for kLanes bytes e; 0 instead of 2^-127.
inline Floats load_powers(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 23));
}
// The numbers whose float8_e4m3fn codes are the top bytes. The bits of a code, moved to those of fp32, are 2^-120 times the number.
inline Floats from_e4m3(Ints top) {
  const Ints bits = _mm256_and_si256(_mm256_srai_epi32(top, 4), _mm256_set1_epi32(static_cast<int32_t>(0x87f00000u)));
  return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));
}
// Every byte n bits lower; its upper bits may be those of the next byte.
constexpr bool kShiftsBytes = false;
template <int n>
inline Ints shift_right(Ints v) { return _mm256_srli_epi16(v, n); }
// The numbers whose codes are `bits` bits (2 or 3) of each word, from bit `first` on: the codes less half of their range.
template <int bits>
inline Floats numbers_in(Ints words, int first) {
  const Ints codes = _mm256_srl_epi32(words, _mm_cvtsi32_si128(first));
  const Floats numbers = bits == 2 ? _mm256_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1) : _mm256_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3);
  return _mm256_permutevar8x32_ps(numbers, codes);  // by the lowest 3 bits
}

}  // namespace
