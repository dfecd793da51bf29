// The kernels, written once over the vector operations that the including file defines for its instruction set: Floats and
// Ints of kLanes numbers, kVectors of them to a panel; a word of Ints holds four bytes, two 16-bit numbers or one of 32 bits.
#include "kernels.h"

namespace rq {
namespace {

// The same byte four times in every word.
inline Ints set_bytes(uint32_t byte) { return set(static_cast<int32_t>(byte * 0x01010101u)); }

// Weights are read once from one end to the other. In a single panel the processor's own prefetcher stops at every page; in
// several side by side it keeps up and must not be overtaken.
template <int panels>
inline void prefetch(const uint8_t* p) {
  __builtin_prefetch(p + (panels == 1 ? 4096 : 512));
}

#include "activation_kernel.h"
#include "float_kernel.h"
#include "quantize.h"
#include "quantized_kernel.h"

}  // namespace

extern const Kernels RQ_KERNELS;
const Kernels RQ_KERNELS = {RQ_KERNELS_NAME, multiply_floats, multiply_quantized, quantize, activate};

}  // namespace rq
