#include "inputs.h"

#include <algorithm>

namespace rq {

using nvinfer1::DataType;
using nvinfer1::Dims;

TensorType tensor_type(DataType type) {
  switch (type) {
    case DataType::kHALF: return TensorType::kFp16;
    case DataType::kBF16: return TensorType::kBf16;
    case DataType::kFLOAT: return TensorType::kFp32;
    case DataType::kINT8: return TensorType::kInt8;
    case DataType::kINT32: return TensorType::kInt32;
    case DataType::kINT64: return TensorType::kInt64;
    default: return TensorType::kOther;
  }
}

std::vector<TensorDescription> described(const nvinfer1::PluginTensorDesc* inputs, int32_t count) {
  std::vector<TensorDescription> result;
  for (int32_t i = 0; i < count; ++i) {
    const Dims& dims = inputs[i].dims;
    result.push_back({tensor_type(inputs[i].type), {dims.d, dims.d + std::clamp<int32_t>(dims.nbDims, 0, Dims::MAX_DIMS)}});
  }
  return result;
}

int64_t token_count(const nvinfer1::PluginTensorDesc* inputs) {
  return token_count(inputs[0].dims.d[0], inputs[1].dims.d[0], inputs[2].dims.d[0]);
}

}  // namespace rq
