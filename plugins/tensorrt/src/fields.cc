#include "fields.h"

#include <algorithm>
#include <set>
#include <stdexcept>

namespace rq {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

void expect(const PluginField& field, std::initializer_list<PluginFieldType> types, const char* words) {
  if (std::find(types.begin(), types.end(), field.type) == types.end())
    refuse_field(field.name, std::string("has another type than ") + words);
  if (field.length < 0 || field.length > kMostSlots) refuse_field(field.name, "has length " + std::to_string(field.length));
  if (field.length && !field.data) refuse_field(field.name, "has no data");
}

std::vector<int32_t> integers(const PluginField& field) {
  expect(field, {PluginFieldType::kINT32, PluginFieldType::kINT64}, "int32 and int64");
  std::vector<int32_t> values(field.length);
  for (int i = 0; i < field.length; ++i) {
    const int64_t value = field.type == PluginFieldType::kINT32 ? static_cast<const int32_t*>(field.data)[i]
                                                                : static_cast<const int64_t*>(field.data)[i];
    values[i] = format_code(value);
  }
  return values;
}

std::vector<float> floats(const PluginField& field) {
  expect(field, {PluginFieldType::kFLOAT32}, "float32");
  const auto* values = static_cast<const float*>(field.data);
  return {values, values + field.length};
}

float one_float(const PluginField& field) {
  const std::vector<float> values = floats(field);
  if (values.size() != 1) refuse_field(field.name, "has " + std::to_string(values.size()) + " values; give one");
  return values[0];
}

std::string activation(const PluginField& field) {
  expect(field, {PluginFieldType::kCHAR}, "char");
  const auto* letters = static_cast<const char*>(field.data);
  return {letters, std::find(letters, letters + field.length, '\0')};
}

}  // namespace

std::array<PluginField, kFieldCount> field_names() {
  return {
      PluginField{"formats", nullptr, PluginFieldType::kINT32, 1}, PluginField{"activation", nullptr, PluginFieldType::kCHAR, 1},
      PluginField{"alpha", nullptr, PluginFieldType::kFLOAT32, 1}, PluginField{"limit", nullptr, PluginFieldType::kFLOAT32, 1},
      PluginField{"shares", nullptr, PluginFieldType::kFLOAT32, 1}};
}

Fields parse_fields(const nvinfer1::PluginFieldCollection* collection) {
  if (!collection || collection->nbFields < 0 || (collection->nbFields && !collection->fields))
    throw std::invalid_argument("there are no fields");
  Fields fields;
  std::set<std::string> seen;
  for (int i = 0; i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    if (!field.name) throw std::invalid_argument("a field has no name");
    const std::string name = field.name;
    if (!seen.insert(name).second) refuse_field(name, "is given twice");
    if (name == "formats") fields.formats = integers(field);
    else if (name == "activation") fields.activation = activation(field);
    else if (name == "alpha") fields.alpha = one_float(field);
    else if (name == "limit") fields.limit = one_float(field);
    else if (name == "shares") fields.shares = floats(field);
    else refuse_field(name, "is unknown; there are formats, activation, alpha, limit and shares");
  }
  check_fields(fields);
  return fields;
}

std::vector<PluginField> as_plugin_fields(const Fields& fields) {
  const auto length = [](const auto& values) { return static_cast<int32_t>(values.size()); };
  std::vector<PluginField> result = {{"formats", fields.formats.data(), PluginFieldType::kINT32, length(fields.formats)},
                                     {"activation", fields.activation.data(), PluginFieldType::kCHAR, length(fields.activation)},
                                     {"alpha", &fields.alpha, PluginFieldType::kFLOAT32, 1},
                                     {"limit", &fields.limit, PluginFieldType::kFLOAT32, 1}};
  if (!fields.shares.empty())
    result.emplace_back("shares", fields.shares.data(), PluginFieldType::kFLOAT32, length(fields.shares));
  return result;
}

}  // namespace rq
