// The plugin's fields: what the graph's node has as attributes, and what an engine keeps.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <vector>

#include "node.h"

namespace rq {

constexpr int kFieldCount = 5;

// Names and types, without data: what TensorRT asks a creator for.
std::array<nvinfer1::PluginField, kFieldCount> field_names();

// Throws std::invalid_argument: a field that is unknown, given twice, of a wrong type or length, or has no such value.
Fields parse_fields(const nvinfer1::PluginFieldCollection* collection);

// The fields that parse_fields makes the same of; they point into `fields`.
std::vector<nvinfer1::PluginField> as_plugin_fields(const Fields& fields);

}  // namespace rq
