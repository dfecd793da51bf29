#include "weights.h"

#include <algorithm>

#include "huge_pages.h"

namespace rq {
namespace {

Matrix float_group(const Tensor& weights, int64_t columns) {
  require(weights.type == kFloat || weights.type == kFloat16 || weights.type == kBfloat16, "float_weights has element type ",
          weights.type, ", not float, float16 or bfloat16");
  require(weights.dim(2) == columns, "float_weights has ", weights.dim(2), " columns, x ", columns);
  const Storage storage = weights.type == kFloat ? Storage::fp32 : weights.type == kFloat16 ? Storage::fp16 : Storage::bf16;
  const size_t panel_bytes = static_cast<size_t>(columns * kPanel) * (storage == Storage::fp32 ? 4 : 2);
  return {storage, weights.as<uint8_t>(), panel_bytes, nullptr, columns, 0, 0};
}

Matrix quantized_group(const Tensor& packed, const Tensor& scales, Storage storage, const char* name, int64_t columns) {
  require(packed.dim(3) == 4 * kPanel, name, " has groups of ", packed.dim(3), " bytes, not ", 4 * kPanel);
  require(scales.dim(0) == packed.dim(0) && scales.dim(1) == packed.dim(1) && scales.dim(3) == kPanel, "the scales of ", name,
          " have other slots or panels");
  const int64_t blocks = scales.dim(2), padded = packed.dim(2) * (storage == Storage::int8 ? 4 : 8);
  require(blocks > 0 && padded % blocks == 0, name, " has ", padded, " columns for ", blocks, " scales a row");
  const int64_t block = padded / blocks;
  require(block > 0 && block % 16 == 0 && block <= kMaxBlock, name, " has blocks of ", block, ", not a multiple of 16 up to ",
          kMaxBlock);
  require((columns + block - 1) / block == blocks, name, " has ", blocks, " blocks of ", block, " for ", columns, " columns");
  return {storage, packed.as<uint8_t>(), static_cast<size_t>(packed.dim(2) * packed.dim(3)), scales.as<float>(), columns, block,
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
    require(format >= 0 && format <= 2, "attribute formats holds ", format, ", not 0, 1 or 2");
    if (in_order) places_.push_back(members_[format]);
    require(places_[s] >= 0 && places_[s] < INT32_MAX, "attribute weights holds ", places_[s]);
    members_[format] = std::max(members_[format], places_[s] + 1);
  }
}

SlotWeights::Bound SlotWeights::bind(const Context& context, size_t first, int64_t panels, int64_t columns) const {
  static constexpr const char* kNames[] = {"float_weights", "int8_packed", "int4_packed"};
  static constexpr const char* kScales[] = {nullptr, "int8_scales", "int4_scales"};
  Bound bound;
  bound.panels = panels;
  for (int f = 0; f < 3; ++f) {
    if (!members_[f]) continue;
    const size_t input = first + (f ? 2 * f - 1 : 0);
    const Tensor packed = context.required(input, kNames[f], 4);
    require(packed.dim(0) == members_[f], kNames[f], " holds ", packed.dim(0), " matrices, the slots need ", members_[f]);
    require(packed.dim(1) == panels, kNames[f], " has ", packed.dim(1), " panels a slot, not ", panels);
    if (f == 0) {
      require(packed.dim(3) == kPanel, "float_weights has panels of ", packed.dim(3), " rows, not ", kPanel);
      bound.groups[0] = float_group(packed, columns);
    } else {
      const Tensor scales = context.required(input + 1, kScales[f], 4);
      bound.groups[f] = quantized_group(packed, scales, f == 1 ? Storage::int8 : Storage::int4, kNames[f], columns);
      require(!bound.block || bound.block == bound.groups[f].block, "int8 has blocks of ", bound.block, ", int4 of ",
              bound.groups[f].block);
      bound.block = bound.groups[f].block;
    }
    bound.slot_bytes[f] = static_cast<size_t>(panels) * bound.groups[f].panel_bytes;
  }
  if (!seen_.exchange(true)) {
    for (int f = 0; f < 3; ++f) {
      prefer_huge_pages(bound.groups[f].data, bound.slot_bytes[f] * static_cast<size_t>(members_[f]));
    }
  }
  return bound;
}

Matrix SlotWeights::of(const Bound& bound, int64_t slot) const {
  const int64_t format = formats_[slot], place = places_[slot];
  Matrix matrix = bound.groups[format];
  matrix.data += static_cast<size_t>(place) * bound.slot_bytes[format];
  if (matrix.scales) matrix.scales += place * bound.panels * matrix.blocks * kPanel;
  return matrix;
}

}  // namespace rq
