// A node MoeLayer as graphs have it: its fields (in ONNX, attributes), its inputs, and the layer that these describe.
// plugins/tensorrt/README.md has both tables.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layer.h"

namespace rq {

constexpr int kMostSlots = 1 << 16;

struct Fields {
  std::vector<int32_t> formats;  // [S] places in kFormatGroups; required
  std::string activation = "none";
  float alpha = 1.702f, limit = 7.0f;
  std::vector<float> shares;  // [S] or empty

  bool has(size_t group) const;
};

// Throws std::invalid_argument.
[[noreturn]] void refuse_field(const std::string& name, const std::string& what);

// `value` as an entry of `formats`. Throws std::invalid_argument if there is no such format.
int32_t format_code(int64_t value);

// Throws std::invalid_argument if a field is missing, or has no such value.
void check_fields(const Fields& fields);

enum class TensorType { kOther, kFp16, kBf16, kFp32, kInt8, kInt32, kInt64 };

struct TensorDescription {
  TensorType type;
  std::vector<int64_t> dims;  // -1: not known yet
};

enum class Role {
  kX,
  kIds,
  kGates,
  kReplicas,
  kFormats,
  kIndex,
  kWeights,
  kScales,
  kBias
};

struct Input {
  Role role;
  bool down = false;  // of the second projection
  size_t group = 0;   // of weights and scales: a place in kFormatGroups
};

// The inputs in order; those of weights follow from the formats, and two more are biases. Throws std::invalid_argument if
// `count` is none of both numbers.
std::vector<Input> input_list(const Fields& fields, size_t count);

bool is_type_of(const Input& input, TensorType type, TensorType type_of_x);

// Throws std::invalid_argument if types or shapes are not those of one layer. The number of tokens is not looked at: it may
// be -1.
Layer describe_layer(const Fields& fields, const std::vector<TensorDescription>& inputs);

// Throws std::invalid_argument unless x, ids and gates are of the same number of tokens, which it returns.
int64_t token_count(int64_t x, int64_t ids, int64_t gates);

// Throws std::invalid_argument if a tensor begins where no kernel can read it.
Buffers device_buffers(const std::vector<Input>& list, const void* const* inputs, void* out, void* workspace);

}  // namespace rq
