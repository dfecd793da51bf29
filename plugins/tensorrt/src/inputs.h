// TensorRT's descriptions of tensors in the launcher's words.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "node.h"

namespace rq {

TensorType tensor_type(nvinfer1::DataType type);

std::vector<TensorDescription> described(const nvinfer1::PluginTensorDesc* inputs, int32_t count);

// Of the inputs that a batch is made of. Throws std::invalid_argument if they differ.
int64_t token_count(const nvinfer1::PluginTensorDesc* inputs);

}  // namespace rq
