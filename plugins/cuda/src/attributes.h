// Converts a node's attributes into the launcher's fields.
#pragma once

#include "node.h"
#include "op.h"

namespace rq {

// Throws std::invalid_argument if an attribute has a wrong type or value. Unknown attributes are not detected, since ONNX Runtime
// gives attributes only by name.
Fields read_fields(const Info& info);

}  // namespace rq
