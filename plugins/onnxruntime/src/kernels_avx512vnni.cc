// AVX-512 with VNNI: one instruction sums four products of an unsigned and a signed byte.
#include "vectors_avx512.h"

namespace {

struct Partial {
  Ints sums = _mm512_setzero_si512();
};
inline Ints dot_bytes(Ints sum, Ints weights, Ints x) { return _mm512_dpbusd_epi32(sum, weights, x); }
inline Partial dot(Partial sum, Ints weights, Ints x) { return {dot_bytes(sum.sums, weights, x)}; }
inline Ints widen(Ints sum, Partial partial) { return _mm512_add_epi32(sum, partial.sums); }

}  // namespace

#define RQ_KERNELS kAvx512VnniKernels
#define RQ_KERNELS_NAME "avx512vnni"
#define RQ_INT8_PRODUCTS "int8_bytes.h"
#include "kernels_body.h"
