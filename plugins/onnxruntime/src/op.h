// What the ops share: tensors, attributes, tiles over the thread pool, and the barrier no exception passes.
#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "ort_api.h"

namespace rq {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws an Error of the streamed parts unless the condition holds.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

inline void check(const Api& api, OrtStatus* status) {
  if (!status) return;
  std::string message = api.GetErrorMessage(static_cast<const OrtStatus*>(status));
  api.ReleaseStatus(status);
  throw Error(message);
}

// Runs `work`; what it throws becomes a status. Nothing may unwind into ONNX Runtime.
template <typename Work>
OrtStatus* guarded(const Api& api, const char* op, Work&& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    try {
      return api.CreateStatus(static_cast<int>(kInvalidArgument), (std::string("rq.moe ") + op + ": " + error.what()).c_str());
    } catch (...) { return api.CreateStatus(static_cast<int>(kFail), "rq.moe: out of memory"); }
  } catch (...) { return api.CreateStatus(static_cast<int>(kFail), "rq.moe: unknown failure"); }
}

struct Tensor {
  static constexpr size_t kMaxRank = 4;
  const void* data = nullptr;
  int type = kUndefined;
  int64_t shape[kMaxRank] = {};
  size_t rank = 0;
  bool present = false;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  int64_t dim(size_t axis) const { return shape[axis]; }
};

class Info {
 public:
  Info(const Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  const Api& api() const { return api_; }
  const OrtKernelInfo* raw() const { return info_; }

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(api_, api_.KernelInfoGetAttribute_int64(info_, name, &value));
    return value;
  }
  int64_t integer(const char* name, int64_t otherwise) const {
    int64_t value = 0;
    return absent(api_.KernelInfoGetAttribute_int64(info_, name, &value)) ? otherwise : value;
  }
  float real(const char* name, float otherwise) const {
    float value = 0;
    return absent(api_.KernelInfoGetAttribute_float(info_, name, &value)) ? otherwise : value;
  }
  std::string text(const char* name, const char* otherwise) const {
    size_t size = 0;
    if (absent(api_.KernelInfoGetAttribute_string(info_, name, static_cast<char*>(nullptr), &size)) || size == 0)
      return otherwise;
    std::string value(size, '\0');
    check(api_, api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size - 1);  // the size counts the terminating zero
    return value;
  }
  // Empty where the node leaves the attribute out.
  std::vector<int64_t> integers(const char* name) const {
    size_t size = 0;
    if (absent(api_.KernelInfoGetAttributeArray_int64(info_, name, static_cast<int64_t*>(nullptr), &size))) return {};
    std::vector<int64_t> value(size);
    if (size) check(api_, api_.KernelInfoGetAttributeArray_int64(info_, name, value.data(), &size));
    return value;
  }

 private:
  bool absent(OrtStatus* status) const {
    if (status) api_.ReleaseStatus(status);
    return status != nullptr;
  }
  const Api& api_;
  const OrtKernelInfo* info_;
};

class Context {
 public:
  Context(const Api& api, OrtKernelContext* context) : api_(api), context_(context) {
    check(api_, api_.KernelContext_GetInputCount(context_, &inputs_));
  }

  static constexpr size_t kAnyRank = SIZE_MAX;

  const Api& api() const { return api_; }
  OrtKernelContext* raw() const { return context_; }
  size_t inputs() const { return inputs_; }

  // The input, or a Tensor that is not `present` when the node leaves it out. Throws on another rank, or one above kMaxRank.
  Tensor input(size_t index, const char* name, size_t rank = kAnyRank) const {
    Tensor tensor;
    const OrtValue* value = nullptr;
    if (index < inputs_) check(api_, api_.KernelContext_GetInput(context_, index, &value));
    if (!value) return tensor;
    const auto expect = [&] {
      require(rank == kAnyRank || tensor.rank == rank, name, " has rank ", tensor.rank, ", not ", rank);
      require(tensor.rank <= Tensor::kMaxRank, name, " has rank ", tensor.rank, ", more than ", Tensor::kMaxRank);
    };
    if (Api::version.load(std::memory_order_relaxed) >= kShapeReferences) {
      const int64_t* shape = nullptr;
      check(api_, api_.GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &shape, &tensor.rank));
      expect();
      std::copy_n(shape, tensor.rank, tensor.shape);
    } else {
      copy_shape(value, tensor, expect);
    }
    void* data = nullptr;
    check(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    tensor.present = true;
    return tensor;
  }
  Tensor required(size_t index, const char* name, size_t rank = kAnyRank) const {
    Tensor tensor = input(index, name, rank);
    require(tensor.present, "input ", name, " is missing");
    return tensor;
  }

  template <typename T>
  T* output(size_t index, std::initializer_list<int64_t> shape) const {
    return output<T>(index, shape.begin(), shape.size());
  }
  template <typename T>
  T* output(size_t index, const int64_t* shape, size_t rank) const {
    OrtValue* value = nullptr;
    check(api_, api_.KernelContext_GetOutput(context_, index, shape, rank, &value));
    require(value != nullptr, "output ", index, " is missing");
    void* data = nullptr;
    check(api_, api_.GetTensorMutableData(value, &data));
    return static_cast<T*>(data);
  }

  // Calls work(tile) for every tile in [0, tiles) on the session's threads; which thread takes which tile is open, so
  // tiles must not depend on each other. The first exception is rethrown here.
  template <typename Work>
  void parallel(size_t tiles, Work& work) const {
    struct Shared {
      Work& work;
      std::atomic<bool> failed{false};
      std::exception_ptr first = nullptr;
    } shared{work};
    auto call = [](void* user, size_t tile) {
      auto& state = *static_cast<Shared*>(user);
      try {
        state.work(tile);
      } catch (...) {
        if (!state.failed.exchange(true)) state.first = std::current_exception();
      }
    };
    if (tiles <= 1) {
      if (tiles) call(&shared, 0);
    } else {
      void (*function)(void*, size_t) = call;
      // As many batches as tiles: the pool hands them out one by one, so that a heavy slot does not hold up one thread.
      OrtStatus* status = api_.KernelContext_ParallelFor(static_cast<const OrtKernelContext*>(context_), function, tiles, tiles,
                                                         static_cast<void*>(&shared));
      check(api_, status);
    }
    if (shared.first) std::rethrow_exception(shared.first);
  }

 private:
  // For ONNX Runtime before 1.24: allocates a description of the tensor.
  template <typename Expect>
  void copy_shape(const OrtValue* value, Tensor& tensor, const Expect& expect) const {
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api_, api_.GetTensorTypeAndShape(value, &raw));
    auto release = [this](OrtTensorTypeAndShapeInfo* info) { api_.ReleaseTensorTypeAndShapeInfo(info); };
    std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(raw, release);
    check(api_, api_.GetTensorElementType(raw, &tensor.type));
    check(api_, api_.GetDimensionsCount(raw, &tensor.rank));
    expect();
    check(api_, api_.GetDimensions(raw, static_cast<int64_t*>(tensor.shape), tensor.rank));
  }

  const Api& api_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
};

// Whether a node may have any number of outputs of the last type: a Kernel that declares kMoreOutputs.
template <typename Kernel, typename = void>
struct HasMoreOutputs : std::false_type {};
template <typename Kernel>
struct HasMoreOutputs<Kernel, std::void_t<decltype(Kernel::kMoreOutputs)>> : std::true_type {};

// The ONNX Runtime callbacks of an op. A Kernel has kName, kInputs (element types), kOptionalInputs (how many more a node may
// have, of any types), kOutputs, a constructor from Info and compute(Context&).
template <typename Kernel>
OrtCustomOp* custom_op() {
  struct Instance {
    Api api;
    Kernel kernel;
  };
  static OrtCustomOp op = [] {
    OrtCustomOp o{};
    o.version = kApiVersion;
    o.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    o.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    o.GetInputType = [](const OrtCustomOp*, size_t i) -> int {
      return i < std::size(Kernel::kInputs) ? Kernel::kInputs[i] : kUndefined;
    };
    o.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kInputs) + Kernel::kOptionalInputs; };
    o.GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i]; };
    o.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kOutputs); };
    o.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int {
      return i < std::size(Kernel::kInputs) ? kRequired : kOptional;
    };
    o.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) -> int {
      return HasMoreOutputs<Kernel>::value && i + 1 == std::size(Kernel::kOutputs) ? kVariadic : kRequired;
    };
    o.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    o.GetVariadicInputMinArity = o.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    o.GetVariadicOutputMinArity = o.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    o.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    o.GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
    o.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* table, const OrtKernelInfo* info, void** kernel) {
      Api api(table);
      return guarded(api, Kernel::kName, [&] { *kernel = new Instance{api, Kernel(Info(api, info))}; });
    };
    o.KernelComputeV2 = [](void* instance, OrtKernelContext* context) {
      auto& self = *static_cast<Instance*>(instance);
      return guarded(self.api, Kernel::kName, [&] {
        Context wrapped(self.api, context);
        self.kernel.compute(wrapped);
      });
    };
    o.KernelDestroy = [](void* instance) { delete static_cast<Instance*>(instance); };
    return o;
  }();
  return &op;
}

OrtCustomOp* dispatch_op();
OrtCustomOp* expert_gemm_op();
OrtCustomOp* dense_gemm_op();
OrtCustomOp* combine_op();
OrtCustomOp* cache_attention_op();
OrtCustomOp* latent_attention_op();
OrtCustomOp* causal_mask_op();

}  // namespace rq
