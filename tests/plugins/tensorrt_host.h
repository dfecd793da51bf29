// A host of the plugin library that has TensorRT's headers only: what its two programs share.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace host {

using namespace nvinfer1;

constexpr auto kX = DataType::kHALF;

struct Log : ILogger, ILoggerFinder {
  std::string last;
  void log(Severity, AsciiChar const* message) noexcept override { last = message; }
  ILogger* findLogger() override { return this; }
};
inline Log logger;
inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (last message: %s)\n", what.c_str(), logger.last.c_str());
}

// A call that has to fail, and to say something about `about`.
inline void expect_refusal(bool refused, const std::string& about) {
  expect(refused, "refusal of " + about);
  expect(logger.last.find(about) != std::string::npos, "a message about " + about);
  logger.last.clear();
}

inline IPluginCreatorV3One* open(const char* library) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(2);
  }
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"))(&logger);
  int32_t count = 0;
  auto* creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"))(count);
  expect(count == 1, "one creator");
  return static_cast<IPluginCreatorV3One*>(creators[0]);
}

struct Plugin {
  std::unique_ptr<IPluginV3> held;
  explicit Plugin(IPluginV3* plugin) : held(plugin) {}
  IPluginV3OneBuild& build() {
    return *static_cast<IPluginV3OneBuild*>(held->getCapabilityInterface(PluginCapabilityType::kBUILD));
  }
  IPluginV3OneCore& core() { return *static_cast<IPluginV3OneCore*>(held->getCapabilityInterface(PluginCapabilityType::kCORE)); }
  IPluginV3OneRuntime& runtime() {
    return *static_cast<IPluginV3OneRuntime*>(held->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  }
};

inline IPluginV3* create(IPluginCreatorV3One& creator, const std::vector<PluginField>& fields,
                         TensorRTPhase phase = TensorRTPhase::kBUILD) {
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return creator.createPlugin("layer", &collection, phase);
}

inline Dims dims_of(std::initializer_list<int64_t> sizes) {
  Dims dims{};
  for (int64_t size : sizes) dims.d[dims.nbDims++] = size;
  return dims;
}

struct Tensor {
  const char* name;
  DataType type;
  Dims dims;
};

// Slots of all formats, swiglu: hidden 256, intermediate 128, 3 experts in 5 slots, 2 choices a token, blocks of 128.
inline const std::vector<int32_t> kFormats = {0, 1, 2, 1, 2};
inline const std::vector<Tensor> kTensors = {{"x", kX, dims_of({-1, 256})},
                                             {"ids", DataType::kINT64, dims_of({-1, 2})},
                                             {"gates", DataType::kFLOAT, dims_of({-1, 2})},
                                             {"replicas", DataType::kINT32, dims_of({3, 3})},
                                             {"formats", DataType::kINT32, dims_of({5})},
                                             {"up_index", DataType::kINT32, dims_of({5})},
                                             {"up_float_weights", kX, dims_of({1, 256, 256})},
                                             {"up_int8_packed", DataType::kINT8, dims_of({2, 256, 256})},
                                             {"up_int8_scales", DataType::kFLOAT, dims_of({2, 256, 2})},
                                             {"up_int4_packed", DataType::kINT8, dims_of({2, 256, 128})},
                                             {"up_int4_scales", DataType::kFLOAT, dims_of({2, 256, 2})},
                                             {"up_bias", DataType::kFLOAT, dims_of({5, 256})},
                                             {"down_index", DataType::kINT32, dims_of({5})},
                                             {"down_float_weights", kX, dims_of({1, 256, 128})},
                                             {"down_int8_packed", DataType::kINT8, dims_of({2, 256, 128})},
                                             {"down_int8_scales", DataType::kFLOAT, dims_of({2, 256, 1})},
                                             {"down_int4_packed", DataType::kINT8, dims_of({2, 256, 64})},
                                             {"down_int4_scales", DataType::kFLOAT, dims_of({2, 256, 1})},
                                             {"down_bias", DataType::kFLOAT, dims_of({5, 256})}};

inline std::vector<DynamicPluginTensorDesc> described(const std::vector<Tensor>& tensors, int64_t most_tokens) {
  std::vector<DynamicPluginTensorDesc> result;
  for (const Tensor& tensor : tensors) {
    DynamicPluginTensorDesc one{};
    one.desc = {tensor.dims, tensor.type, TensorFormat::kLINEAR, 1.0f};
    one.min = one.max = one.opt = tensor.dims;
    if (tensor.dims.d[0] < 0) one.min.d[0] = 1, one.opt.d[0] = 1 + most_tokens / 2, one.max.d[0] = most_tokens;
    result.push_back(one);
  }
  return result;
}

inline std::vector<PluginField> fields_of(const std::vector<int32_t>& formats, const char* activation = "swiglu") {
  return {{"formats", formats.data(), PluginFieldType::kINT32, static_cast<int32_t>(formats.size())},
          {"activation", activation, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(activation))}};
}

inline int configure(Plugin& plugin, const std::vector<DynamicPluginTensorDesc>& inputs) {
  return plugin.build().configurePlugin(inputs.data(), static_cast<int32_t>(inputs.size()), inputs.data(), 1);
}

}  // namespace host
