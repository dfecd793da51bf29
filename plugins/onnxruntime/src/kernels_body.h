// The kernels, written once over the vector operations that the including file defines for its instruction set: Floats and
// Ints of kLanes numbers, kVectors of them to a panel; a word of Ints holds four bytes, two 16-bit numbers or one of 32 bits.
#include "kernels.h"

namespace rq {
namespace {

// Weights are read once from one end to the other; a processor's own prefetcher stops at every page.
constexpr int64_t kAhead = 4096;

#include "activation_kernel.h"
#include "float_kernel.h"
#include "quantize.h"
#include "quantized_kernel.h"

}  // namespace

extern const Kernels RQ_KERNELS;
const Kernels RQ_KERNELS = {RQ_KERNELS_NAME, multiply_floats, multiply_quantized, quantize, activate};

}  // namespace rq
