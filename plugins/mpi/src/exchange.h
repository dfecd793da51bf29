// The ops that connect the ranks of an MoE layer.
#pragma once

#include "op.h"

namespace rq {

OrtCustomOp* exchange_dispatch_op();
OrtCustomOp* exchange_return_op();

}  // namespace rq
