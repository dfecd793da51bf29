// Do these kernels give this processor the right answers?
#pragma once

#include "kernels.h"

namespace rq {

// Multiplies small random matrices of every storage: the same bits as the plain kernels where x is quantized, the same
// numbers but for rounding where it is not. Takes well under a millisecond.
bool agrees_with_plain(const Kernels& kernels);

}  // namespace rq
