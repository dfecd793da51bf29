// AVX-512 with VNNI: one instruction sums four products of an unsigned and a signed byte.
#include "vectors_avx512.h"

namespace {

constexpr int32_t kInt8Offset = 128;
constexpr int kQuantizedRows = 8;
constexpr int kDotInstructions = 1;
constexpr int quantized_panels(int, int instructions) { return instructions == 1 ? 1 : 2; }

using Partial = Ints;
constexpr int kPartialColumns = 1024;  // of any block
inline Ints dot_int8(Ints sum, Ints weights, Ints x) { return _mm512_dpbusd_epi32(sum, weights, x); }
inline Ints dot_int4(Ints sum, Ints weights, Ints x) { return dot_int8(sum, weights, x); }

}  // namespace

#define RQ_KERNELS kAvx512VnniKernels
#define RQ_KERNELS_NAME "avx512vnni"
#include "kernels_body.h"
