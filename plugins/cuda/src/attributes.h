// A node's attributes as the launcher's fields.
#pragma once

#include "node.h"
#include "op.h"

namespace rq {

// Throws std::invalid_argument: an attribute has another type, or no such value. One that is unknown is not seen: ONNX Runtime
// gives attributes by name only.
Fields read_fields(const Info& info);

}  // namespace rq
