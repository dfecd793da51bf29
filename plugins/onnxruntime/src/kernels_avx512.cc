// AVX-512 without VNNI: the products of int8 as in AVX2.
#include "vectors_avx512.h"

namespace {

constexpr int32_t kInt8Offset = 0;
constexpr int kQuantizedRows = 4;
constexpr int kDotInstructions = 6;  // of dot_int8
constexpr int quantized_panels(int rows, int) { return rows <= 2 ? 4 : 1; }

constexpr int kPartialColumns = 32;
struct Partial {
  Ints words = _mm512_setzero_si512();
};
inline Partial dot_int4(Partial sum, Ints weights, Ints x) {
  return {_mm512_add_epi16(sum.words, _mm512_maddubs_epi16(weights, x))};
}
inline Ints widen(Ints sum, Partial partial) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(partial.words, _mm512_set1_epi16(1)));
}
inline Ints dot_int8(Ints sum, Ints weights, Ints x) {
  const Ints w = _mm512_xor_si512(weights, _mm512_set1_epi8(-128));
  const Ints signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  const Ints words = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
}

}  // namespace

#define RQ_KERNELS kAvx512Kernels
#define RQ_KERNELS_NAME "avx512"
#include "kernels_body.h"
