// AVX-512 with BF16: one more instruction sums two products of bf16 in fp32.
#include "vectors_avx512.h"

namespace {

constexpr int bfloat_panels(int) { return 2; }
inline Floats dot_pair(Floats sum, Ints weights, Ints x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}

}  // namespace

#include "kernels.h"

namespace rq {
namespace {

#include "loops.h"
#include "bfloat_bits.h"
#include "bfloat_kernel.h"

}  // namespace

const BfloatProducts kAvx512Bf16Bfloats = multiply_bfloats;
const RoundToBfloat kAvx512Bf16Round = round_to_bfloat;

}  // namespace rq
