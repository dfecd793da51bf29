#include "moe_layer.h"

#include <algorithm>

#include "attributes.h"
#include "scratch.h"

namespace rq {
namespace {

constexpr size_t kOfTokens = 3;  // x, ids and gates have a row for each token

TensorType tensor_type(int type) {
  switch (type) {
    case kFloat16: return TensorType::kFp16;
    case kBfloat16: return TensorType::kBf16;
    case kFloat: return TensorType::kFp32;
    case kInt8: return TensorType::kInt8;
    case kInt32: return TensorType::kInt32;
    case kInt64: return TensorType::kInt64;
    default: return TensorType::kOther;
  }
}

void leave_tokens_open(std::vector<TensorDescription>& inputs) {
  for (size_t i = 0; i < std::min(kOfTokens, inputs.size()); ++i)
    if (!inputs[i].dims.empty()) inputs[i].dims[0] = -1;
}

// The graph's description of the inputs; a shape that the graph does not give has no dimensions.
std::vector<TensorDescription> graph_inputs(const Info& info) {
  const Api& api = info.api();
  size_t count = 0;
  check(api, api.KernelInfo_GetInputCount(info.raw(), &count));
  std::vector<TensorDescription> inputs(count);
  for (size_t i = 0; i < count; ++i) {
    OrtTypeInfo* raw = nullptr;
    check(api, api.KernelInfo_GetInputTypeInfo(info.raw(), i, &raw));
    const auto release = [&](OrtTypeInfo* held) { api.ReleaseTypeInfo(held); };
    const std::unique_ptr<OrtTypeInfo, decltype(release)> type_info(raw, release);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    check(api, api.CastTypeInfoToTensorInfo(static_cast<const OrtTypeInfo*>(raw), &tensor));
    require(tensor != nullptr, "input ", i, " is not a tensor");
    int type = kUndefined;
    size_t rank = 0;
    check(api, api.GetTensorElementType(tensor, &type));
    check(api, api.GetDimensionsCount(tensor, &rank));
    inputs[i] = {tensor_type(type), std::vector<int64_t>(rank)};
    check(api, api.GetDimensions(tensor, inputs[i].dims.data(), rank));
  }
  leave_tokens_open(inputs);
  return inputs;
}

bool shapes_are_known(const std::vector<TensorDescription>& inputs) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto& dims = inputs[i].dims;
    if (dims.empty() || std::count(dims.begin() + (i < kOfTokens), dims.end(), -1)) return false;
  }
  return true;
}

bool same(const std::vector<TensorDescription>& a, const std::vector<TensorDescription>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const auto& one, const auto& other) { return one.type == other.type && one.dims == other.dims; });
}

const OrtMemoryInfo* memory_of_x(const Context& context) {
  const Api& api = context.api();
  const OrtKernelContext* raw = context.raw();
  const OrtValue* x = nullptr;
  const OrtMemoryInfo* memory = nullptr;
  check(api, api.KernelContext_GetInput(raw, size_t{0}, &x));
  check(api, api.GetTensorMemoryInfo(x, &memory));
  return memory;
}

void* stream_of(const Context& context) {
  const OrtKernelContext* raw = context.raw();
  void* stream = nullptr;
  check(context.api(), context.api().KernelContext_GetGPUComputeStream(raw, &stream));
  return stream;
}

const OrtApi* shape_inference_table = nullptr;

// The output has the shape of x, if that is known.
OrtStatus* infer_shape(const OrtCustomOp*, OrtShapeInferContext* context) {
  const Api api(shape_inference_table);
  return guarded(api, "MoeLayer", [&] {
    const OrtShapeInferContext* raw = context;
    OrtTensorTypeAndShapeInfo* x = nullptr;
    size_t rank = 0;
    check(api, api.ShapeInferContext_GetInputTypeShape(raw, size_t{0}, &x));  // the context's own
    const OrtTensorTypeAndShapeInfo* known = x;
    check(api, api.GetDimensionsCount(known, &rank));
    if (rank == 2) check(api, api.ShapeInferContext_SetOutputTypeShape(raw, size_t{0}, known));
  });
}

template <int kTypeOfX>
struct MoeLayerOf : MoeLayer {
  static constexpr const char* kName = "MoeLayer";
  static constexpr int kInputs[] = {kTypeOfX, kInt64, kFloat, kInt32, kInt32, kUndefined};
  static constexpr int kOutputs[] = {kTypeOfX};
  static constexpr size_t kOptionalInputs = 0;
  using MoeLayer::MoeLayer;
};

// The inputs after the first five depend on the formats: one variadic input of any types, which MoeLayer checks itself.
template <int kTypeOfX>
const OrtCustomOp* moe_layer_op() {
  static const OrtCustomOp op = [] {
    OrtCustomOp o = *custom_op<MoeLayerOf<kTypeOfX>>();
    o.GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
    o.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return i < 5 ? kRequired : kVariadic; };
    o.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 4; };  // an index and weights, twice
    o.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    o.InferOutputShapeFn = infer_shape;
    return o;
  }();
  return &op;
}

}  // namespace

MoeLayer::MoeLayer(const Info& info) : fields_(read_fields(info)) {
  const std::vector<TensorDescription> inputs = graph_inputs(info);
  list_ = input_list(fields_, inputs.size());
  if (shapes_are_known(inputs)) LayerKernels{describe_layer(fields_, inputs)};
}

std::shared_ptr<const MoeLayer::Prepared> MoeLayer::prepared_for(std::vector<TensorDescription> inputs) {
  leave_tokens_open(inputs);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!prepared_ || !same(prepared_->inputs, inputs)) {
    const Layer layer = describe_layer(fields_, inputs);
    Prepared prepared{std::move(inputs), layer, LayerKernels(layer)};
    prepared.kernels.load();
    prepared_ = std::make_shared<const Prepared>(std::move(prepared));
  }
  return prepared_;
}

void MoeLayer::compute(const Context& context) {
  std::vector<TensorDescription> inputs;
  std::vector<const void*> pointers;
  for (size_t i = 0; i < context.inputs(); ++i) {
    const Tensor tensor = context.required(i, std::to_string(i).c_str());
    inputs.push_back({tensor_type(tensor.type), {tensor.shape, tensor.shape + tensor.rank}});
    pointers.push_back(tensor.data);
  }
  const auto prepared = prepared_for(inputs);
  const auto rows = [&](size_t i) { return inputs[i].dims[0]; };
  const int64_t tokens = token_count(rows(0), rows(1), rows(2));
  void* out = context.output<char>(0, {tokens, prepared->layer.hidden});
  if (tokens == 0) return;
  void* stream = stream_of(context);
  const Scratch workspace(context, memory_of_x(context), stream, workspace_bytes(prepared->layer, tokens));
  prepared->kernels.run(tokens, device_buffers(list_, pointers.data(), out, workspace.data()), static_cast<CUstream>(stream));
}

std::vector<const OrtCustomOp*> moe_layer_ops() { return {moe_layer_op<kFloat16>(), moe_layer_op<kBfloat16>()}; }

void set_shape_inference_api(const OrtApi* table) { shape_inference_table = table; }

}  // namespace rq
