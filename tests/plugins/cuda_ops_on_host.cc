// librq_moe_cuda.so in an ONNX Runtime without CUDA. This library is registered in its place and registers it (RQ_LIBRARY)
// unchanged, with a table in which what only a CUDA provider has is replaced: its ops go to the CPU provider, whose memory then
// stands for the device's, and on_stream(1) makes a stream and its scratch memory.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

#include "ort_api.h"

namespace {

// Of version 24, the newest of which the library uses an entry where there is one, and of version 18.
constexpr size_t kEntries = 415, kEntriesOf18 = 279;
constexpr size_t kGuard = 4096;
constexpr char kUnused = 0x5A;

const void* table[kEntries];
const OrtApi* real = nullptr;
bool streaming = false;
std::mutex mutex;
std::map<void*, size_t> held;
size_t taken = 0;

template <typename Function>
void replace(size_t entry, Function* function) {
  table[entry] = reinterpret_cast<const void*>(function);
}

struct OnCpu : OrtCustomOp {
  const OrtCustomOp* original;
};

OrtStatus* add(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
  static std::deque<OnCpu> ops;
  if (std::strcmp(op->GetExecutionProviderType(op), "CUDAExecutionProvider") != 0) std::abort();
  for (size_t i = 0; i < op->GetInputTypeCount(op); ++i)
    if (op->GetInputMemoryType(op, i) != 0) std::abort();
  OnCpu& copy = ops.emplace_back();
  static_cast<OrtCustomOp&>(copy) = *op;
  copy.original = op;
  copy.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  copy.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    const OrtCustomOp* given = static_cast<const OnCpu*>(self)->original;
    return given->CreateKernelV2(given, reinterpret_cast<const OrtApi*>(table), info, kernel);
  };
  const OrtCustomOp* added = &copy;
  return rq::Api(real).CustomOpDomain_Add(domain, added);
}

OrtStatus* stream(const OrtKernelContext*, void** out) {
  *out = streaming ? &streaming : nullptr;
  return nullptr;
}

OrtStatus* scratch(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes, void** out) {
  if (!streaming) std::abort();  // ONNX Runtime would crash, too
  const rq::Api api(real);
  OrtAllocator* allocator = nullptr;
  if (OrtStatus* status = api.KernelContext_GetAllocator(context, memory, &allocator)) return status;
  OrtStatus* status = api.AllocatorAlloc(allocator, bytes + kGuard, out);
  api.ReleaseAllocator(allocator);
  if (status) return status;
  std::memset(*out, kUnused, bytes + kGuard);
  const std::lock_guard<std::mutex> lock(mutex);
  held[*out] = bytes;
  ++taken;
  return nullptr;
}

OrtStatus* give_back(OrtAllocator* allocator, void* memory) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = held.find(memory);
    if (found != held.end()) {
      const char* guard = static_cast<const char*>(memory) + found->second;
      for (size_t i = 0; i < kGuard; ++i)
        if (guard[i] != kUnused) std::abort();  // written beyond what was asked for
      held.erase(found);
    }
  }
  return rq::Api(real).AllocatorFree(allocator, memory);
}

const OrtApiBase* real_base = nullptr;
const OrtApi* table_of(uint32_t version) noexcept {
  return version == 18 ? reinterpret_cast<const OrtApi*>(table) : real_base->GetApi(version);
}

}  // namespace

extern "C" {

void on_stream(int on) { streaming = on; }
const void* the_stream() { return &streaming; }
size_t scratch_taken() { return taken; }
size_t scratch_held() { return held.size(); }

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  real_base = base;
  real = base->GetApi(18);
  int minor = 0;
  std::sscanf(base->GetVersionString(), "1.%d", &minor);
  std::memcpy(table, reinterpret_cast<const void*>(real), (minor >= 24 ? kEntries : kEntriesOf18) * sizeof *table);
  replace(27, add);
  replace(76, give_back);
  replace(193, stream);
  replace(277, scratch);
  void* library = dlopen(std::getenv("RQ_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::abort();
  }
  static const OrtApiBase replaced{table_of, base->GetVersionString};
  using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
  return reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"))(options, &replaced);
}

}  // extern "C"
