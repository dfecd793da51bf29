// AVX2 with AVX-VNNI: one instruction sums four products of an unsigned and a signed byte.
#include "vectors_avx2.h"

namespace {

constexpr int32_t kInt8Offset = 128;

struct Partial {
  Ints sums = _mm256_setzero_si256();
};
inline Ints dot_int8(Ints sum, Ints weights, Ints x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
inline Partial dot_int4(Partial sum, Ints weights, Ints x) { return {dot_int8(sum.sums, weights, x)}; }
inline Ints widen(Ints sum, Partial partial) { return _mm256_add_epi32(sum, partial.sums); }

}  // namespace

#define RQ_KERNELS kAvxVnniKernels
#define RQ_KERNELS_NAME "avxvnni"
#include "kernels_body.h"
