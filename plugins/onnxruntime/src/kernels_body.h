// The kernels, written once over the vector operations that the including file defines for its instruction set: Floats and
// Ints of kLanes numbers, kVectors of them to a panel; a word of Ints holds four bytes, two 16-bit numbers or one of 32 bits.
#include "kernels.h"

namespace rq {
namespace {

#include "activation_kernel.h"
#include "float_kernel.h"
#include "quantize.h"
#include "quantized_kernel.h"
#include RQ_INT8_PRODUCTS

void multiply_quantized(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                        int64_t panel, float* out) {
  if (weights.storage == Storage::int8) return multiply_int8(x, rows, layout, weights, panel, out);
  multiply_blocks<Int4Products>(x, rows, layout, weights, panel, out);
}

}  // namespace

extern const Kernels RQ_KERNELS;
const Kernels RQ_KERNELS = {RQ_KERNELS_NAME, kInt8Words, multiply_floats, multiply_quantized, quantize, activate};

}  // namespace rq
