#include "node.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace rq {
namespace {

using Dims = std::vector<int64_t>;

constexpr const char* kNames[] = {"x", "ids", "gates", "replicas", "formats", "index", nullptr, nullptr, "bias"};
constexpr int64_t kAny = -1;  // a dimension that may have any size, or is checked elsewhere
constexpr int64_t kMostOfASize = 1 << 24;
constexpr uintptr_t kAlignment = 16;

const FormatGroup& group_of(const Input& input) { return kFormatGroups[input.group]; }

std::string name_of(const Input& input) {
  const std::string name = input.role == Role::kWeights  ? group_of(input).weights
                           : input.role == Role::kScales ? group_of(input).scales
                                                         : kNames[static_cast<int>(input.role)];
  return input.role < Role::kIndex ? name : (input.down ? "down_" : "up_") + name;
}

std::string text_of(const Dims& dims) {
  std::string joined;
  for (int64_t size : dims) joined += (joined.empty() ? "" : ", ") + (size == kAny ? "?" : std::to_string(size));
  return "[" + joined + "]";
}

void require_shape(const Input& input, const Dims& dims, const Dims& expected) {
  bool fits = dims.size() == expected.size();
  for (size_t i = 0; fits && i < dims.size(); ++i) fits = expected[i] == kAny ? dims[i] >= -1 : dims[i] == expected[i];
  if (!fits) throw std::invalid_argument(name_of(input) + " is " + text_of(dims) + " where " + text_of(expected) + " is needed");
}

int known_size(const Input& input, const Dims& dims, size_t i) {
  if (dims[i] < 1 || dims[i] > kMostOfASize)
    throw std::invalid_argument("dimension " + std::to_string(i) + " of " + name_of(input) + " is " + std::to_string(dims[i]) +
                                "; only the number of tokens may change");
  return static_cast<int>(dims[i]);
}

// The number of columns that share a scale.
int block_of(const Input& input, const Dims& packed, const Dims& scales, int columns) {
  const int bytes = known_size(input, packed, 2), blocks = known_size(input, scales, 2);
  const int bits = group_of(input).bits, filled = bytes * 8 / bits;
  const int block = filled / blocks;
  if (bytes * 8 % bits || filled % blocks || blocks != columns / block + (columns % block != 0))
    throw std::invalid_argument(name_of(input) + " has " + std::to_string(filled) + " columns in " + std::to_string(blocks) +
                                " blocks, which are not those of " + std::to_string(columns) + " columns");
  return block;
}

}  // namespace

bool Fields::has(size_t group) const {
  return std::find(formats.begin(), formats.end(), static_cast<int32_t>(group)) != formats.end();
}

void refuse_field(const std::string& name, const std::string& what) { throw std::invalid_argument("field " + name + " " + what); }

int32_t format_code(int64_t value) {
  if (!is_group(value, kGpuGroups))
    refuse_field("formats", "has " + std::to_string(value) + "; " + known_groups(kGpuGroups));
  return static_cast<int32_t>(value);
}

void check_fields(const Fields& fields) {
  const auto& [formats, activation, alpha, limit, shares] = fields;
  if (formats.empty()) refuse_field("formats", "is missing; give the format of every slot");
  if (formats.size() > kMostSlots) refuse_field("formats", "has length " + std::to_string(formats.size()));
  if (activation_code(activation) < 0)
    refuse_field("activation", "has an activation that is unknown; plugins/tensorrt/README.md lists them");
  if (!std::isfinite(alpha)) refuse_field("alpha", "has a value that is not finite");
  if (!std::isfinite(limit)) refuse_field("limit", "has a value that is not finite");
  if (!shares.empty() && shares.size() != formats.size())
    refuse_field("shares", "has " + std::to_string(shares.size()) + " values for " + std::to_string(formats.size()) + " slots");
  for (float share : shares)
    if (!(share >= 0 && share <= 1))
      refuse_field("shares", "has " + std::to_string(share) + "; a share is a part of all pairs, 0 to 1");
}

std::vector<Input> input_list(const Fields& fields, size_t count) {
  std::vector<Input> weights = {{Role::kIndex}};
  for (size_t g = 0; g < kGpuGroups; ++g) {
    if (!fields.has(g)) continue;
    weights.push_back({Role::kWeights, false, g});
    if (kFormatGroups[g].scales) weights.push_back({Role::kScales, false, g});
  }
  const size_t without = 5 + 2 * weights.size();
  if (count != without && count != without + 2)
    throw std::invalid_argument("these formats need " + std::to_string(without) + " inputs, or " + std::to_string(without + 2) +
                                " with biases, and " + std::to_string(count) + " are given");
  if (count != without) weights.push_back({Role::kBias});
  std::vector<Input> list;
  for (Role role : {Role::kX, Role::kIds, Role::kGates, Role::kReplicas, Role::kFormats}) list.push_back({role});
  for (bool down : {false, true})
    for (const Input& input : weights) list.push_back({input.role, down, input.group});
  return list;
}

bool is_type_of(const Input& input, TensorType type, TensorType type_of_x) {
  switch (input.role) {
    case Role::kX: return type == TensorType::kFp16 || type == TensorType::kBf16;
    case Role::kWeights: return group_of(input).scales ? type == TensorType::kInt8 : type == type_of_x;
    case Role::kScales: return type == (group_of(input).exponents ? TensorType::kInt8 : TensorType::kFp32);
    case Role::kIds: return type == TensorType::kInt64;
    case Role::kReplicas:
    case Role::kFormats:
    case Role::kIndex: return type == TensorType::kInt32;
    default: return type == TensorType::kFp32;
  }
}

Layer describe_layer(const Fields& fields, const std::vector<TensorDescription>& inputs) {
  const std::vector<Input> list = input_list(fields, inputs.size());
  for (size_t i = 0; i < list.size(); ++i)
    if (!is_type_of(list[i], inputs[i].type, inputs[0].type)) throw std::invalid_argument(name_of(list[i]) + " has a wrong type");
  Layer layer;
  layer.dtype = inputs[0].type == TensorType::kFp16 ? Float::kFp16 : Float::kBf16;
  layer.formats.assign(fields.formats.begin(), fields.formats.end());
  layer.shares = fields.shares;
  layer.activation = activation_code(fields.activation);
  layer.alpha = fields.alpha;
  layer.limit = fields.limit;
  layer.biased = list.back().role == Role::kBias;
  const int halves = is_gated(layer.activation) ? 2 : 1;

  const auto dims = [&](size_t i) -> const Dims& { return inputs[i].dims; };
  require_shape(list[0], dims(0), {kAny, kAny});
  require_shape(list[1], dims(1), {kAny, kAny});
  layer.hidden = known_size(list[0], dims(0), 1);
  layer.top_k = known_size(list[1], dims(1), 1);
  require_shape(list[2], dims(2), {kAny, layer.top_k});
  require_shape(list[3], dims(3), {kAny, kAny});
  layer.experts = known_size(list[3], dims(3), 0);
  layer.width = known_size(list[3], dims(3), 1);
  require_shape(list[4], dims(4), {layer.slots()});

  for (size_t i = 5; i < list.size(); ++i) {
    const Input& input = list[i];
    const bool first_weights = !input.down && list[i - 1].role == Role::kIndex;
    if (first_weights) {
      require_shape(input, dims(i), {kAny, kAny, kAny});
      layer.intermediate = known_size(input, dims(i), 1) / halves;
    }
    const int outputs = input.down ? layer.hidden : halves * layer.intermediate;
    const int columns = input.down ? layer.intermediate : layer.hidden;
    switch (input.role) {
      case Role::kIndex: require_shape(input, dims(i), {layer.slots()}); break;
      case Role::kBias: require_shape(input, dims(i), {layer.slots(), outputs}); break;
      case Role::kWeights: {
        if (!group_of(input).scales) {
          require_shape(input, dims(i), {kAny, outputs, columns});
          known_size(input, dims(i), 0);
          break;
        }
        require_shape(input, dims(i), {kAny, outputs, kAny});
        require_shape(list[i + 1], dims(i + 1), {known_size(input, dims(i), 0), outputs, kAny});
        int& block = input.down ? layer.down_block : layer.up_block;
        const int found = block_of(input, dims(i), dims(i + 1), columns);
        if (block && block != found) throw std::invalid_argument("quantized weights have blocks of different sizes");
        block = found;
        break;
      }
      default:  // scales were checked together with their weights
        break;
    }
  }
  return layer;
}

int64_t token_count(int64_t x, int64_t ids, int64_t gates) {
  if (x < 0 || ids != x || gates != x) throw std::invalid_argument("x, ids and gates are of different numbers of tokens");
  return x;
}

Buffers device_buffers(const std::vector<Input>& list, const void* const* inputs, void* out, void* workspace) {
  for (size_t i = 0; i < list.size(); ++i)
    if (reinterpret_cast<uintptr_t>(inputs[i]) % kAlignment)
      throw std::invalid_argument(name_of(list[i]) + " begins at an address that is not a multiple of 16 bytes");
  Buffers buffers{inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], {}, {}, out, workspace};
  for (size_t i = 5; i < list.size(); ++i) {
    Weights& weights = list[i].down ? buffers.down : buffers.up;
    switch (list[i].role) {
      case Role::kIndex: weights.index = inputs[i]; break;
      case Role::kWeights: weights.weights[list[i].group] = inputs[i]; break;
      case Role::kScales: weights.scales[list[i].group] = inputs[i]; break;
      default: weights.bias = inputs[i]; break;
    }
  }
  return buffers;
}

}  // namespace rq
