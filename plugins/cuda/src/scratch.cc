#include "scratch.h"

namespace rq {

Scratch::Scratch(const Context& context, const OrtMemoryInfo* memory, void* stream, size_t bytes) : api_(context.api()) {
  const OrtKernelContext* raw = context.raw();
  check(api_, api_.KernelContext_GetAllocator(raw, memory, &allocator_));
  // GetScratchBuffer marks the memory as the stream's, so that no other stream gets it early; without one it would crash.
  OrtStatus* status =
      stream ? api_.KernelContext_GetScratchBuffer(raw, memory, bytes, &data_) : api_.AllocatorAlloc(allocator_, bytes, &data_);
  try {
    check(api_, status);
    require(data_ != nullptr, "there are no ", bytes, " bytes for the workspace");
  } catch (...) {
    api_.ReleaseAllocator(allocator_);
    throw;
  }
}

Scratch::~Scratch() {
  if (OrtStatus* status = api_.AllocatorFree(allocator_, data_)) api_.ReleaseStatus(status);
  api_.ReleaseAllocator(allocator_);
}

}  // namespace rq
