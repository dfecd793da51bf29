// Checks whether kernels compute correct results on this processor.
#pragma once

#include "kernels.h"

namespace rq {

// Multiplies small random matrices of every storage. The result must have the same bits as with the plain kernels if x is
// quantized, and the same numbers except for rounding if it is not. Takes well under a millisecond.
bool agrees_with_plain(const Kernels& kernels);

}  // namespace rq
