// In place of the compiler's header: AVX-512 by SIMDe (github.com/simd-everywhere/simde), and here what its release 0.7.4 lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

namespace emulated {

// An `Out` of `count` numbers, the i-th of which is `number(in, i)`.
template <typename Out, typename To, typename From, int count, typename In, typename Number>
Out each(In vector, Number number) {
  From in[sizeof(In) / sizeof(From)];
  To out[count];
  memcpy(in, &vector, sizeof in);
  for (int i = 0; i < count; ++i) out[i] = number(in, i);
  Out result;
  memcpy(&result, out, sizeof result);
  return result;
}

template <typename To, typename From>
To converted(const From* in, int i) {
  return static_cast<To>(in[i]);
}

inline simde__m512 floats_of_words(simde__m512i a) { return each<simde__m512, float, int32_t, 16>(a, converted<float, int32_t>); }
inline simde__m512i words_of_shorts(simde__m256i a) {
  return each<simde__m512i, int32_t, uint16_t, 16>(a, converted<int32_t, uint16_t>);
}
inline simde__m512i words_of_bytes(simde__m128i a) { return each<simde__m512i, int32_t, uint8_t, 16>(a, converted<int32_t, uint8_t>); }
inline simde__m512 floats_of_halves(simde__m256i a) {
  return each<simde__m512, float, _Float16, 16>(a, converted<float, _Float16>);
}

inline simde__m512i words_shifted_right(simde__m512i a, int bits) {
  return each<simde__m512i, int32_t, int32_t, 16>(a, [&](const int32_t* in, int i) { return in[i] >> bits; });
}

// Sums of pairs of products.
inline simde__m512i multiplied_pairs(simde__m512i a, simde__m512i b) {
  int16_t other[32];
  memcpy(other, &b, sizeof other);
  return each<simde__m512i, int32_t, int16_t, 16>(
      a, [&](const int16_t* in, int i) { return in[2 * i] * other[2 * i] + in[2 * i + 1] * other[2 * i + 1]; });
}

}  // namespace emulated

#define _mm512_shuffle_f32x4(a, b, quarters) \
  _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), quarters))
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated::multiplied_pairs
#define _mm512_cvtepi32_ps emulated::floats_of_words
#define _mm512_cvtepu16_epi32 emulated::words_of_shorts
#define _mm512_cvtepu8_epi32 emulated::words_of_bytes
#define _mm512_srai_epi32 emulated::words_shifted_right
#define _mm512_cvtph_ps emulated::floats_of_halves
#include "amx.h"
