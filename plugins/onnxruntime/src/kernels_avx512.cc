// AVX-512 without VNNI.
#include "vectors_avx512.h"

namespace {

// Two products of int4 and int8 are at most 2 * 15 * 127 in magnitude: 16 bits hold the sum of eight such pairs.
struct Partial {
  Ints words = _mm512_setzero_si512();
};
inline Partial dot(Partial sum, Ints weights, Ints x) {
  return {_mm512_add_epi16(sum.words, _mm512_maddubs_epi16(weights, x))};
}
inline Ints widen(Ints sum, Partial partial) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(partial.words, _mm512_set1_epi16(1)));
}
inline Ints even_bytes(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi16(255)); }
inline Ints odd_bytes(Ints v) { return _mm512_srli_epi16(v, 8); }
inline Ints add_words(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
inline Ints dot_words(Ints sum, Ints a, Ints b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }

}  // namespace

#define RQ_KERNELS kAvx512Kernels
#define RQ_KERNELS_NAME "avx512"
#define RQ_INT8_PRODUCTS "int8_words.h"
#include "kernels_body.h"
