// The plugin's fields: the attributes of the graph's node, which an engine stores too.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <vector>

#include "node.h"

namespace rq {

constexpr int kFieldCount = 5;

// Names and types, without data, as TensorRT requests them from a creator.
std::array<nvinfer1::PluginField, kFieldCount> field_names();

// Throws std::invalid_argument if a field is unknown, is given twice, or has a wrong type, length or value.
Fields parse_fields(const nvinfer1::PluginFieldCollection* collection);

// The fields from which parse_fields makes an equal result; they point into `fields`.
std::vector<nvinfer1::PluginField> as_plugin_fields(const Fields& fields);

}  // namespace rq
