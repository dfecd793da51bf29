// AVX2 with AVX-VNNI: one instruction sums four products of an unsigned and a signed byte.
#include "vectors_avx2.h"

namespace {

constexpr int32_t kInt8Offset = 128;
constexpr int kQuantizedRows = 2;
constexpr int quantized_panels(int rows, int) { return rows == 1 ? 4 : 1; }

using Partial = Ints;
constexpr int kPartialColumns = 1024;  // of any block
inline Ints dot_int8(Ints sum, Ints weights, Ints x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
inline Ints dot_int4(Ints sum, Ints weights, Ints x) { return dot_int8(sum, weights, x); }

}  // namespace

#include "quantized_body.h"

const rq::QuantizedProducts rq::kAvxVnniQuantized = multiply_quantized;
