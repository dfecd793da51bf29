// AVX-512 with VNNI: one instruction sums four products of an unsigned and a signed byte.
#include "vectors_avx512.h"

namespace {

constexpr int32_t kInt8Offset = 128;

struct Partial {
  Ints sums = _mm512_setzero_si512();
};
inline Ints dot_int8(Ints sum, Ints weights, Ints x) { return _mm512_dpbusd_epi32(sum, weights, x); }
inline Partial dot_int4(Partial sum, Ints weights, Ints x) { return {dot_int8(sum.sums, weights, x)}; }
inline Ints widen(Ints sum, Partial partial) { return _mm512_add_epi32(sum, partial.sums); }

}  // namespace

#define RQ_KERNELS kAvx512VnniKernels
#define RQ_KERNELS_NAME "avx512vnni"
#include "kernels_body.h"
