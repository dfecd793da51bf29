// The part of ONNX Runtime's C interface that our libraries use, at the version they target (17, ONNX Runtime 1.17; the
// functions that only the CUDA library uses are of version 18; one of version 24 is used where there is one).
//
// OrtApi is a table of function pointers that only grows at its end, so an entry is identified by its index. The indices were
// counted in ONNX Runtime's source, whose static assertions fix the last index of every version.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtShapeInferContext;
struct OrtAllocator;
struct OrtMemoryInfo;
struct OrtTypeInfo;
struct OrtApi;  // used only as a table of pointers, through Api below

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

// Fields up to version 17, in ONNX Runtime's order.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};
}

namespace rq {

constexpr uint32_t kApiVersion = 17;
constexpr uint32_t kShapeReferences = 24;  // the version from which on a shape can be read without a copy

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kBool = 9,
  kFloat16 = 10,
  kBfloat16 = 16
};
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };

// A typed view of the table.
class Api {
 public:
  explicit Api(const OrtApi* table) : table_(reinterpret_cast<void* const*>(table)) {}

  // The version of the interface that the process's ONNX Runtime has, which may be newer than the one that the libraries target.
  static inline std::atomic<uint32_t> version{kApiVersion};

#define RQ_ENTRY(index, result, name, ...)                        \
  using name##Function = result (*)(__VA_ARGS__);                 \
  template <typename... A>                                        \
  result name(A... a) const {                                     \
    return reinterpret_cast<name##Function>(table_[index])(a...); \
  }
  RQ_ENTRY(0, OrtStatus*, CreateStatus, int code, const char* message)
  RQ_ENTRY(2, const char*, GetErrorMessage, const OrtStatus*)
  RQ_ENTRY(26, OrtStatus*, CreateCustomOpDomain, const char* domain, OrtCustomOpDomain**)
  RQ_ENTRY(27, OrtStatus*, CustomOpDomain_Add, OrtCustomOpDomain*, const OrtCustomOp*)
  RQ_ENTRY(28, OrtStatus*, AddCustomOpDomain, OrtSessionOptions*, OrtCustomOpDomain*)
  RQ_ENTRY(51, OrtStatus*, GetTensorMutableData, OrtValue*, void**)
  RQ_ENTRY(55, OrtStatus*, CastTypeInfoToTensorInfo, const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**)
  RQ_ENTRY(60, OrtStatus*, GetTensorElementType, const OrtTensorTypeAndShapeInfo*, int*)
  RQ_ENTRY(61, OrtStatus*, GetDimensionsCount, const OrtTensorTypeAndShapeInfo*, size_t*)
  RQ_ENTRY(62, OrtStatus*, GetDimensions, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)
  RQ_ENTRY(65, OrtStatus*, GetTensorTypeAndShape, const OrtValue*, OrtTensorTypeAndShapeInfo**)
  RQ_ENTRY(75, OrtStatus*, AllocatorAlloc, OrtAllocator*, size_t bytes, void**)
  RQ_ENTRY(76, OrtStatus*, AllocatorFree, OrtAllocator*, void*)
  RQ_ENTRY(85, OrtStatus*, KernelInfoGetAttribute_float, const OrtKernelInfo*, const char*, float*)
  RQ_ENTRY(86, OrtStatus*, KernelInfoGetAttribute_int64, const OrtKernelInfo*, const char*, int64_t*)
  RQ_ENTRY(87, OrtStatus*, KernelInfoGetAttribute_string, const OrtKernelInfo*, const char*, char*, size_t*)
  RQ_ENTRY(88, OrtStatus*, KernelContext_GetInputCount, const OrtKernelContext*, size_t*)
  RQ_ENTRY(90, OrtStatus*, KernelContext_GetInput, const OrtKernelContext*, size_t, const OrtValue**)
  RQ_ENTRY(91, OrtStatus*, KernelContext_GetOutput, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)
  RQ_ENTRY(93, void, ReleaseStatus, OrtStatus*)
  RQ_ENTRY(98, void, ReleaseTypeInfo, OrtTypeInfo*)
  RQ_ENTRY(99, void, ReleaseTensorTypeAndShapeInfo, OrtTensorTypeAndShapeInfo*)
  RQ_ENTRY(101, void, ReleaseCustomOpDomain, OrtCustomOpDomain*)
  RQ_ENTRY(132, void, ReleaseAllocator, OrtAllocator*)
  RQ_ENTRY(162, OrtStatus*, KernelInfoGetAttributeArray_float, const OrtKernelInfo*, const char*, float*, size_t*)
  RQ_ENTRY(163, OrtStatus*, KernelInfoGetAttributeArray_int64, const OrtKernelInfo*, const char*, int64_t*, size_t*)
  RQ_ENTRY(193, OrtStatus*, KernelContext_GetGPUComputeStream, const OrtKernelContext*, void**)
  RQ_ENTRY(194, OrtStatus*, GetTensorMemoryInfo, const OrtValue*, const OrtMemoryInfo**)
  RQ_ENTRY(230, OrtStatus*, KernelInfo_GetInputCount, const OrtKernelInfo*, size_t*)
  RQ_ENTRY(234, OrtStatus*, KernelInfo_GetInputTypeInfo, const OrtKernelInfo*, size_t, OrtTypeInfo**)
  RQ_ENTRY(253, OrtStatus*, KernelContext_GetAllocator, const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**)
  RQ_ENTRY(268, OrtStatus*, ShapeInferContext_GetInputTypeShape, const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**)
  RQ_ENTRY(270, OrtStatus*, ShapeInferContext_SetOutputTypeShape, const OrtShapeInferContext*, size_t,
           const OrtTensorTypeAndShapeInfo*)
  RQ_ENTRY(274, OrtStatus*, KernelContext_ParallelFor, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)
  RQ_ENTRY(277, OrtStatus*, KernelContext_GetScratchBuffer, const OrtKernelContext*, const OrtMemoryInfo*, size_t bytes, void**)
  RQ_ENTRY(414, OrtStatus*, GetTensorElementTypeAndShapeDataReference, const OrtValue*, int*, const int64_t**, size_t*)
#undef RQ_ENTRY

 private:
  void* const* table_;
};

}  // namespace rq
