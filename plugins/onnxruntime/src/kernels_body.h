// The kernels, written once over the vector operations that the including file defines for its instruction set: Floats and
// Ints of kLanes numbers, kVectors of them to a panel; a word of Ints holds four bytes, two 16-bit numbers or one of 32 bits.
// It also defines the best sizes for its registers and caches: how many rows are multiplied at once (kFloatRows,
// kQuantizedRows; kUnpackingRows: with how many of them quantized weights are converted to fp32 in registers), how many panels
// such a block of rows reads side by side (float_panels, bfloat_panels, quantized_panels; at most kSideBySide),
// what is prefetched per 64 bytes of a panel, depending on the number of panels and of instructions per 64 bytes (prefetch,
// kDotInstructions), and for how many columns a Partial can hold the products (kPartialColumns).
#include "kernels.h"

namespace rq {
namespace {

#include "activation_kernel.h"
#include "combine_kernel.h"
#include "loops.h"
#include "panel_groups.h"
#include "quantized_numbers.h"
#include "float_kernel.h"
#include "attention_kernel.h"
#include "round.h"
#include "bfloat_bits.h"
#include "bfloat_as_float.h"
#include "quantized_kernel.h"

}  // namespace

extern const Kernels RQ_KERNELS;
const Kernels RQ_KERNELS = {RQ_KERNELS_NAME, multiply_floats, multiply_bfloats, multiply_quantized, convert,
                            round_to_bfloat, quantize,        activate,         combine,
                            dot_keys,        raise,           exponentials,     weigh_values};

}  // namespace rq
