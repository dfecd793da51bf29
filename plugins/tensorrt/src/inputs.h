// The plugin's inputs: which there are, of which types and shapes, and the layer that these describe.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "fields.h"
#include "layer.h"

namespace rq {

enum class Role {
  kX,
  kIds,
  kGates,
  kReplicas,
  kFormats,
  kIndex,
  kFloat,
  kInt8Packed,
  kInt8Scales,
  kInt4Packed,
  kInt4Scales,
  kBias
};

struct Input {
  Role role;
  bool down;  // of the second projection
};

// The inputs in order; those of weights follow from the formats, and two more are biases. Throws std::invalid_argument if
// `count` is none of both numbers.
std::vector<Input> input_list(const Fields& fields, int count);

bool is_type_of(const Input& input, nvinfer1::DataType type, nvinfer1::DataType type_of_x);

// Throws std::invalid_argument if the shapes are not those of one layer. The number of tokens is not looked at: it may be -1.
Layer describe_layer(const Fields& fields, const std::vector<nvinfer1::PluginTensorDesc>& inputs);

// Throws std::invalid_argument unless x, ids and gates are of the same number of tokens, which it returns.
int64_t token_count(const nvinfer1::PluginTensorDesc* inputs);

Buffers device_buffers(const std::vector<Input>& list, const void* const* inputs, void* out, void* workspace);

}  // namespace rq
