// Memory of ONNX Runtime's arena for the launches of one node.
#pragma once

#include "op.h"

namespace rq {

// `bytes` of the memory that `memory` describes, to be used on the node's stream without waiting for the host. It is returned by
// the destructor, although the launches may still be queued: the arena reuses it in the order of that stream.
class Scratch {
 public:
  // Throws rq::Error if there is no such memory. `stream`: null if ONNX Runtime has none.
  Scratch(const Context& context, const OrtMemoryInfo* memory, void* stream, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  const Api& api_;
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace rq
