#include "weights.h"

#include <algorithm>

#include "huge_pages.h"

namespace rq {
namespace {

// The kernels' name for each format group. That of float weights depends on their type.
constexpr Storage kStorage[] = {Storage::fp32, Storage::int8, Storage::int4, Storage::mxfp4, Storage::fp8,
                                Storage::int3, Storage::int2};
static_assert(std::size(kStorage) == kGroups, "each format group has its kernels");

// Reads the inputs of a node in order, and skips missing ones: in version 1 of the op set, nodes have empty inputs for formats
// that no slot has.
class Operands {
 public:
  Operands(const Context& context, size_t first) : context_(context), next_(first) {}

  // The next input; if there is none, a Tensor that is not `present`.
  Tensor next(const char* name, size_t rank) {
    while (next_ < context_.inputs()) {
      if (const Tensor tensor = context_.input(next_++, name, rank); tensor.present) return tensor;
    }
    return {};
  }

  Tensor required(const char* name, size_t rank) {
    const Tensor tensor = next(name, rank);
    require(tensor.present, "input ", name, " is missing");
    return tensor;
  }

 private:
  const Context& context_;
  size_t next_;
};

void require_type(const Tensor& tensor, const char* name, int type, const char* called) {
  require(tensor.type == type, name, " has element type ", tensor.type, ", not ", called);
}

Matrix float_group(const Tensor& weights, const char* name, int64_t columns) {
  require(weights.type == kFloat || weights.type == kFloat16 || weights.type == kBfloat16, name, " has element type ",
          weights.type, ", not float, float16 or bfloat16");
  require(weights.dim(3) == kPanel, name, " has panels of ", weights.dim(3), " rows, not ", kPanel);
  require(weights.dim(2) == columns, name, " has ", weights.dim(2), " columns, x ", columns);
  const Storage storage = weights.type == kFloat ? Storage::fp32 : weights.type == kFloat16 ? Storage::fp16 : Storage::bf16;
  const size_t panel_bytes = static_cast<size_t>(columns * kPanel) * (storage == Storage::fp32 ? 4 : 2);
  return {storage, weights.as<uint8_t>(), panel_bytes, nullptr, columns, 0, 0};
}

Matrix quantized_group(const Tensor& packed, const Tensor& scales, const FormatGroup& group, Storage storage, int64_t columns) {
  const char* name = group.weights;
  require_type(packed, name, kUint8, "uint8");
  require_type(scales, group.scales, scale_bytes(storage) == 1 ? kUint8 : kFloat, scale_bytes(storage) == 1 ? "uint8" : "float");
  require(packed.dim(3) == 4 * kPanel, name, " has groups of ", packed.dim(3), " bytes, not ", 4 * kPanel);
  require(scales.dim(0) == packed.dim(0) && scales.dim(1) == packed.dim(1) && scales.dim(3) == kPanel, "the scales of ", name,
          " have other slots or panels");
  const int64_t blocks = scales.dim(2), words = packed.dim(2), padded = words * 32 / group.bits;
  const bool fills_words = 32 % group.bits == 0;
  require(blocks > 0 && (fills_words ? padded : words) % blocks == 0, name, " has ", padded, " columns for ", blocks,
          " scales a row");
  const int64_t block = fills_words ? padded / blocks : words / blocks * 32 / group.bits / 16 * 16;
  require(block > 0 && block % 16 == 0 && block <= kMaxBlock, name, " has blocks of ", block, ", not a multiple of 16 up to ",
          kMaxBlock);
  require(words_of(block, group.bits) * blocks == words, name, " has blocks of ", words / blocks, " words, which no block takes");
  require((columns + block - 1) / block == blocks, name, " has ", blocks, " blocks of ", block, " for ", columns, " columns");
  return {storage, packed.as<uint8_t>(), static_cast<size_t>(packed.dim(2) * packed.dim(3)), scales.as<uint8_t>(), columns, block,
          blocks};
}

}  // namespace

SlotWeights::SlotWeights(std::vector<int64_t> formats, std::vector<int64_t> places)
    : formats_(std::move(formats)), places_(std::move(places)) {
  require(!formats_.empty(), "attribute formats is empty");
  require(places_.empty() || places_.size() == formats_.size(), "attribute weights has ", places_.size(), " entries for ",
          formats_.size(), " slots");
  const bool in_order = places_.empty();
  for (size_t s = 0; s < formats_.size(); ++s) {
    const int64_t format = formats_[s];
    require(is_group(format), "attribute formats holds ", format, "; ", known_groups());
    if (in_order) places_.push_back(members_[format]);
    require(places_[s] >= 0 && places_[s] < INT32_MAX, "attribute weights holds ", places_[s]);
    members_[format] = std::max(members_[format], places_[s] + 1);
  }
}

SlotWeights::Bound SlotWeights::bind(const Context& context, size_t first, int64_t panels, int64_t columns) const {
  Operands operands(context, first);
  Bound bound;
  bound.panels = panels;
  for (size_t g = 0; g < kGroups; ++g) {
    if (!members_[g]) continue;
    const FormatGroup& group = kFormatGroups[g];
    const Tensor weights = operands.required(group.weights, 4);
    require(weights.dim(0) == members_[g], group.weights, " holds ", weights.dim(0), " matrices, the slots need ", members_[g]);
    require(weights.dim(1) == panels, group.weights, " has ", weights.dim(1), " panels a slot, not ", panels);
    if (group.scales) {
      bound.groups[g] = quantized_group(weights, operands.required(group.scales, 4), group, kStorage[g], columns);
      require(!bound.block || bound.block == bound.groups[g].block, group.weights, " has blocks of ", bound.groups[g].block,
              ", the group before it of ", bound.block);
      bound.block = bound.groups[g].block;
    } else {
      bound.groups[g] = float_group(weights, group.weights, columns);
    }
    bound.slot_bytes[g] = static_cast<size_t>(panels) * bound.groups[g].panel_bytes;
  }
  bound.bias = operands.next("bias", 2);
  if (bound.bias.present) require_type(bound.bias, "bias", kFloat, "float");
  const bool more = operands.next("what follows the bias", Context::kAnyRank).present;
  require(!more, "there are more inputs than the slots' formats and a bias");
  if (!seen_.exchange(true)) {
    for (size_t g = 0; g < kGroups; ++g) {
      prefer_huge_pages(bound.groups[g].data, bound.slot_bytes[g] * static_cast<size_t>(members_[g]));
    }
  }
  return bound;
}

bool SlotWeights::takes_int8(int64_t slot) const { return rq::takes_int8(kStorage[formats_[slot]]); }

Matrix SlotWeights::of(const Bound& bound, int64_t slot) const {
  const int64_t format = formats_[slot], place = places_[slot];
  Matrix matrix = bound.groups[format];
  matrix.data += static_cast<size_t>(place) * bound.slot_bytes[format];
  if (matrix.scales) matrix.scales += place * bound.panels * matrix.blocks * kPanel * scale_bytes(matrix.storage);
  return matrix;
}

}  // namespace rq
