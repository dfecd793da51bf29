// A MoeLayer node of a graph: its fields (attributes in ONNX), its inputs, and the layer that they describe.
// plugins/tensorrt/README.md lists the fields and the inputs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layer.h"

namespace rq {

constexpr int kMostSlots = 1 << 16;

struct Fields {
  std::vector<int32_t> formats;  // [S] indices into kFormatGroups; required
  std::string activation = "none";
  float alpha = 1.702f, limit = 7.0f;
  std::vector<float> shares;  // [S] or empty

  bool has(size_t group) const;
};

// Throws std::invalid_argument.
[[noreturn]] void refuse_field(const std::string& name, const std::string& what);

// `value` as an entry of `formats`. Throws std::invalid_argument if there is no such format.
int32_t format_code(int64_t value);

// Throws std::invalid_argument if a field is missing or has an invalid value.
void check_fields(const Fields& fields);

enum class TensorType { kOther, kFp16, kBf16, kFp32, kInt8, kInt32, kInt64 };

struct TensorDescription {
  TensorType type;
  std::vector<int64_t> dims;  // -1: not known yet
};

enum class Role { kX, kIds, kGates, kReplicas, kFormats, kIndex, kWeights, kScales, kBias };

struct Input {
  Role role;
  bool down = false;  // of the second projection
  size_t group = 0;   // of weights and scales: an index into kFormatGroups
};

// The inputs in order. The formats determine the inputs for weights; two more inputs are the biases. Throws
// std::invalid_argument if `count` is neither the number with biases nor the number without.
std::vector<Input> input_list(const Fields& fields, size_t count);

bool is_type_of(const Input& input, TensorType type, TensorType type_of_x);

// Throws std::invalid_argument if types or shapes do not fit together. The number of tokens is not checked: it may be -1.
Layer describe_layer(const Fields& fields, const std::vector<TensorDescription>& inputs);

// Returns the number of tokens. Throws std::invalid_argument if x, ids and gates have different numbers of tokens.
int64_t token_count(int64_t x, int64_t ids, int64_t gates);

// Throws std::invalid_argument if a tensor is not aligned to 16 bytes.
Buffers device_buffers(const std::vector<Input>& list, const void* const* inputs, void* out, void* workspace);

}  // namespace rq
