// AVX-512 with VNNI and BF16: one more instruction sums two products of bf16 in fp32.
#include "vnni_avx512.h"

namespace {

constexpr int bfloat_panels(int) { return 2; }
inline Floats dot_pair(Floats sum, Ints weights, Ints x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}

}  // namespace

#define RQ_BFLOAT_PRODUCTS
#define RQ_KERNELS kAvx512Bf16Kernels
#define RQ_KERNELS_NAME "avx512bf16"
#include "kernels_body.h"
