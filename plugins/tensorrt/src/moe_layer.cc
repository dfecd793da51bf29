#include "moe_layer.h"

#include <limits>
#include <memory>
#include <stdexcept>

#include "log.h"

namespace rq {
namespace {

using namespace nvinfer1;

void require_one_output(int32_t count) {
  if (count != 1) throw std::invalid_argument("there is one output, not " + std::to_string(count));
}

std::vector<TensorDescription> described(const DynamicPluginTensorDesc* inputs, int32_t count) {
  std::vector<PluginTensorDesc> descriptions;
  for (int32_t i = 0; i < count; ++i) descriptions.push_back(inputs[i].desc);
  return rq::described(descriptions.data(), count);
}

// The most bytes that any batch of the profile needs. Throws if the profile has no maximum, or one that is too large.
size_t most_workspace_bytes(const Layer& layer, const DynamicPluginTensorDesc* inputs) {
  const int64_t most = inputs[0].max.d[0];
  if (most < 0) throw std::invalid_argument("the profile's maximum is " + std::to_string(most) + " tokens");
  return workspace_bytes(layer, most);
}

}  // namespace

IPluginCapability* MoeLayer::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* MoeLayer::clone() noexcept {
  return guarded<IPluginV3*>(nullptr, [&] { return new MoeLayer(fields_); });
}

int32_t MoeLayer::getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                                     int32_t input_count) const noexcept {
  return guarded(-1, [&] {
    require_one_output(output_count);
    input_list(fields_, input_count);
    outputs[0] = inputs[0];
    return 0;
  });
}

int32_t MoeLayer::getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t, DimsExprs* outputs,
                                  int32_t output_count, IExprBuilder&) noexcept {
  return guarded(-1, [&] {
    require_one_output(output_count);
    input_list(fields_, input_count);
    if (inputs[0].nbDims != 2)
      throw std::invalid_argument("x has " + std::to_string(inputs[0].nbDims) + " dimensions where 2 are needed");
    outputs[0] = inputs[0];
    return 0;
  });
}

bool MoeLayer::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t input_count,
                                         int32_t output_count) noexcept {
  return guarded(false, [&] {
    require_one_output(output_count);
    const std::vector<Input> list = input_list(fields_, input_count);
    if (position < 0 || position > input_count) throw std::invalid_argument("there is no tensor " + std::to_string(position));
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    const DataType type_of_x = tensors[0].desc.type;
    return position == input_count ? tensor.type == type_of_x
                                   : is_type_of(list[position], tensor_type(tensor.type), tensor_type(type_of_x));
  });
}

int32_t MoeLayer::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count, DynamicPluginTensorDesc const*,
                                  int32_t output_count) noexcept {
  return guarded(-1, [&] {
    require_one_output(output_count);
    const Layer layer = describe_layer(fields_, described(inputs, input_count));
    LayerKernels{layer};
    most_workspace_bytes(layer, inputs);
    return 0;
  });
}

size_t MoeLayer::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t input_count, DynamicPluginTensorDesc const*,
                                  int32_t) const noexcept {
  // No builder has so much memory. If it asks although configurePlugin failed, it cannot mistake the failure for "none is needed".
  return guarded(std::numeric_limits<size_t>::max() / 4,
                 [&] { return most_workspace_bytes(describe_layer(fields_, described(inputs, input_count)), inputs); });
}

int32_t MoeLayer::onShapeChange(PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const*,
                                int32_t output_count) noexcept {
  kernels_.reset();
  return guarded(-1, [&] {
    require_one_output(output_count);
    LayerKernels kernels(describe_layer(fields_, described(inputs, input_count)));
    token_count(inputs);
    kernels.load();
    inputs_ = input_list(fields_, input_count);
    kernels_ = std::move(kernels);
    return 0;
  });
}

int32_t MoeLayer::enqueue(PluginTensorDesc const* input_descriptions, PluginTensorDesc const*, void const* const* inputs,
                          void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(-1, [&] {
    if (!kernels_) throw std::runtime_error("no kernels are loaded; onShapeChange comes first, and must succeed");
    if (!workspace)
      throw std::runtime_error("there is no workspace; the engine was built without what getWorkspaceSize asks for");
    kernels_->run(token_count(input_descriptions), device_buffers(inputs_, inputs, outputs[0], workspace), stream);
    return 0;
  });
}

PluginFieldCollection const* MoeLayer::getFieldsToSerialize() noexcept {
  return guarded<PluginFieldCollection const*>(nullptr, [&] {
    serialized_ = as_plugin_fields(fields_);
    collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
  });
}

}  // namespace rq
