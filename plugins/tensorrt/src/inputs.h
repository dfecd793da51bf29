// Converts TensorRT's descriptions of tensors into the launcher's.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "node.h"

namespace rq {

TensorType tensor_type(nvinfer1::DataType type);

std::vector<TensorDescription> described(const nvinfer1::PluginTensorDesc* inputs, int32_t count);

// The number of tokens of a batch's inputs. Throws std::invalid_argument if they differ.
int64_t token_count(const nvinfer1::PluginTensorDesc* inputs);

}  // namespace rq
