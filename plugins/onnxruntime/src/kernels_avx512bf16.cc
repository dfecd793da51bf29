// AVX-512 with VNNI and BF16: one more instruction sums two products of bf16 in fp32.
#include "vnni_avx512.h"

namespace {

constexpr int bfloat_panels(int) { return 2; }
// Two columns, one after the other, as pairs: the numbers of a row stand together.
inline Ints paired(Ints columns) {
  alignas(64) static constexpr uint16_t kPlaces[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), columns);
}
inline void store(uint8_t* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Floats dot_pair(Floats sum, Ints weights, Ints x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}

}  // namespace

#define RQ_BFLOAT_PRODUCTS
#define RQ_KERNELS kAvx512Bf16Kernels
#define RQ_KERNELS_NAME "avx512bf16"
#include "kernels_body.h"
