// The plugin's fields: what the graph's node has as attributes, and what an engine keeps.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>
#include <vector>

namespace rq {

struct Fields {
  std::vector<int32_t> formats;  // [S] 0 float, 1 int8, 2 int4; required
  std::string activation = "none";
  float alpha = 1.702f, limit = 7.0f;
  std::vector<float> shares;  // [S] or empty

  bool has(int format) const;
};

constexpr int kFieldCount = 5;

// Names and types, without data: what TensorRT asks a creator for.
std::array<nvinfer1::PluginField, kFieldCount> field_names();

// Throws std::invalid_argument: a field that is unknown, given twice, of a wrong type or length, or has no such value.
Fields parse_fields(const nvinfer1::PluginFieldCollection* collection);

// The fields that parse_fields makes the same of; they point into `fields`.
std::vector<nvinfer1::PluginField> as_plugin_fields(const Fields& fields);

}  // namespace rq
