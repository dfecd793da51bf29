#include "layer.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <stdexcept>

namespace rq {
namespace {

constexpr const char* kActivations[] = {"none",           "swiglu", "geglu", "geglu_tanh", "clamped_swiglu",
                                        "limited_swiglu", "relu",   "gelu",  "relu2"};
constexpr int64_t kChunk = 128;     // pairs for each program of Dispatch
constexpr size_t kAlignment = 256;  // of every buffer in the workspace
constexpr int64_t kBytesOfFloat = 2;

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t pair_count(const Layer& layer, int64_t tokens) {
  if (tokens < 0 || tokens > (std::numeric_limits<int32_t>::max() - kChunk) / layer.top_k)
    throw std::runtime_error(std::to_string(tokens) + " tokens are too many for one launch");
  return tokens * layer.top_k;
}

// The offset of every buffer in the workspace, in bytes.
struct Workspace {
  size_t counts, offsets, tiles, tile_count, rows, middle, outputs, bytes = 0;

  Workspace(const Layer& layer, int64_t tokens) {
    const int64_t pairs = pair_count(layer, tokens), slots = layer.slots();
    counts = take(4 * std::max<int64_t>(ceil_div(pairs, kChunk), 1) * layer.experts);
    offsets = take(4 * (slots + 1));
    tiles = take(4 * 3 * most_tiles(pairs, slots, tile_sizes.front().rows));
    tile_count = take(4);
    rows = take(4 * pairs);
    middle = take(kBytesOfFloat * pairs * layer.intermediate);
    outputs = take(kBytesOfFloat * pairs * layer.hidden);
  }

 private:
  size_t take(int64_t wanted) {
    const size_t start = bytes;
    bytes += (static_cast<size_t>(wanted) + kAlignment - 1) / kAlignment * kAlignment;
    return start;
  }
};

CUdeviceptr pointer(const void* address) { return reinterpret_cast<CUdeviceptr>(address); }

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_sizes(const Layer& layer) {
  const auto text = [](auto number) { return std::to_string(number); };
  require(!layer.formats.empty(), "a layer has at least one slot");
  for (int format : layer.formats)
    require(is_group(format, kGpuGroups), "format " + text(format) + " is unknown; " + known_groups(kGpuGroups));
  require(layer.shares.empty() || layer.shares.size() == layer.formats.size(),
          "there are " + text(layer.shares.size()) + " shares for " + text(layer.slots()) + " slots; give one for each");
  for (int size : {layer.hidden, layer.intermediate})
    require(size > 0 && size % 16 == 0, "the kernels take sizes that are multiples of 16, not " + text(size));
  require(layer.experts > 0 && layer.width > 0 && layer.top_k > 0, "experts, replicas of one and choices a token are at least 1");
  require(layer.activation >= 0 && layer.activation < static_cast<int>(std::size(kActivations)),
          "activation " + text(layer.activation) + " is unknown");
}

bool has_few_bits(const Layer& layer) {
  return std::any_of(layer.formats.begin(), layer.formats.end(), [](int format) { return kFormatGroups[format].few_bits(); });
}

std::string formats_of(const Layer& layer) {
  const int first = layer.formats.front();
  const bool same = std::all_of(layer.formats.begin(), layer.formats.end(), [=](int format) { return format == first; });
  if (same && !has_few_bits(layer)) return kFormatGroups[first].name;
  for (int format : layer.formats)
    require(kFormatGroups[format].mixes,
            std::string("the kernels take slots in ") + kFormatGroups[format].name + " only if all slots of the layer are");
  return has_few_bits(layer) ? "few" : "mixed";
}

// The number of sizes in tile_sizes, from the first on, that the layer has kernels for.
size_t size_count(const Layer& layer) {
  const auto few = [](const TileSize& size) { return size.few_bits; };
  return has_few_bits(layer) ? std::count_if(tile_sizes.begin(), tile_sizes.end(), few) : tile_sizes.size();
}

Loaded find(const std::string& name) {
  const Kernel* kernel = find_kernel(name);
  require(kernel, "this library was built without the kernel " + name);
  return Loaded{kernel, 0, nullptr};
}

// Kernels that step over 128 columns have a variant for blocks of 64 columns; those of mxfp4 step over 32.
Loaded find_product(const std::string& name, int block) {
  const Loaded found = find(name);
  if (block == 0 || block % found.kernel->step == 0) return found;
  const int multiple = std::min(found.kernel->step, 64);
  require(block % multiple == 0, "the kernels take blocks that are multiples of " + std::to_string(multiple) + ", not " + std::to_string(block));
  return find(name + "_block64");
}

// The kernel arguments for the tensors of each format group.
struct GroupArguments {
  CUdeviceptr Arguments::*weights, Arguments::*scales;
};
constexpr GroupArguments kGroupArguments[] = {
    {&Arguments::float_weights, nullptr},
    {&Arguments::int8_packed, &Arguments::int8_scales},
    {&Arguments::int4_packed, &Arguments::int4_scales},
    {&Arguments::mxfp4_packed, &Arguments::mxfp4_scales},
    {&Arguments::fp8_packed, &Arguments::fp8_scales},
    {&Arguments::int3_packed, &Arguments::int3_scales},
    {&Arguments::int2_packed, &Arguments::int2_scales},
};
static_assert(std::size(kGroupArguments) == kGpuGroups, "each format group has its arguments");

void set_weights(Arguments& arguments, const Weights& weights) {
  arguments.weights = pointer(weights.index);
  arguments.bias = pointer(weights.bias);
  for (size_t g = 0; g < kGpuGroups; ++g) {
    arguments.*kGroupArguments[g].weights = pointer(weights.weights[g]);
    if (kGroupArguments[g].scales) arguments.*kGroupArguments[g].scales = pointer(weights.scales[g]);
  }
}

}  // namespace

int activation_code(const std::string& name) {
  const auto found = std::find(std::begin(kActivations), std::end(kActivations), name);
  return found == std::end(kActivations) ? -1 : static_cast<int>(found - std::begin(kActivations));
}

bool is_gated(int activation) { return activation >= 1 && activation <= 5; }

size_t workspace_bytes(const Layer& layer, int64_t tokens) { return Workspace(layer, tokens).bytes; }

int64_t most_tiles(int64_t pairs, int64_t slots, int64_t rows_per_tile) {
  const int64_t touched = std::min(pairs, slots);
  return (pairs - touched) / rows_per_tile + touched;
}

size_t choose_tiles(const Layer& layer, int64_t pairs) {
  size_t best = 0;
  double lowest = std::numeric_limits<double>::infinity();
  for (size_t size = 0; size < size_count(layer); ++size) {
    const double rows_per_tile = tile_sizes[size].rows;
    double tiles = 0;
    for (int slot = 0; slot < layer.slots(); ++slot) {
      const double share = layer.shares.empty() ? 1.0 / layer.slots() : layer.shares[slot];
      tiles += std::ceil(std::ceil(share * static_cast<double>(pairs)) / rows_per_tile);
    }
    const double cost = tiles * std::max<double>(rows_per_tile, reread);
    if (cost < lowest) {
      lowest = cost;
      best = size;
    }
  }
  return best;
}

LayerKernels::LayerKernels(const Layer& layer) : layer_(layer) {
  check_sizes(layer);
  const std::string dtype = layer.dtype == Float::kFp16 ? "fp16" : "bf16";
  for (const char* name : {"dispatch_count", "dispatch_scan", "dispatch_scatter", "dispatch_small"})
    kernels_.push_back(find(name));
  kernels_.push_back(find("combine_" + dtype));
  for (size_t size = 0; size < size_count(layer); ++size) {
    const std::string variant = dtype + "_" + formats_of(layer) + "_" + tile_sizes[size].name;
    kernels_.push_back(find_product((is_gated(layer.activation) ? "up_gated_" : "up_plain_") + variant, layer.up_block));
    kernels_.push_back(find_product("down_" + variant, layer.down_block));
  }
}

void LayerKernels::load() {
  for (Loaded& kernel : kernels_) kernel = rq::load(*kernel.kernel);
}

void LayerKernels::run(int64_t tokens, const Buffers& buffers, CUstream stream) const {
  const int64_t pairs = pair_count(layer_, tokens);
  if (pairs == 0) return;
  const Workspace at(layer_, tokens);
  const auto workspace = pointer(buffers.workspace);
  const size_t size = choose_tiles(layer_, pairs);

  Arguments arguments{};
  arguments.tokens = static_cast<int32_t>(tokens);
  arguments.pairs = static_cast<int32_t>(pairs);
  arguments.chunks = static_cast<int32_t>(ceil_div(pairs, kChunk));
  arguments.experts = layer_.experts;
  arguments.width = layer_.width;
  arguments.slots = layer_.slots();
  arguments.top_k = layer_.top_k;
  arguments.rows_per_tile = tile_sizes[size].rows;
  arguments.row_tiles = static_cast<int32_t>(most_tiles(pairs, layer_.slots(), tile_sizes[size].rows));
  arguments.ids = pointer(buffers.ids);
  arguments.gates = pointer(buffers.gates);
  arguments.replicas = pointer(buffers.replicas);
  arguments.formats = pointer(buffers.formats);
  arguments.counts = workspace + at.counts;
  arguments.offsets = workspace + at.offsets;
  arguments.tiles = workspace + at.tiles;
  arguments.tile_count = workspace + at.tile_count;
  arguments.rows = workspace + at.rows;
  if (pairs <= small) {
    launch(kernels_[kSmall], arguments, stream);
  } else {
    for (int step : {kCount, kScan, kScatter}) launch(kernels_[step], arguments, stream);
  }

  arguments.biased = layer_.biased;
  arguments.activation = layer_.activation;
  arguments.alpha = layer_.alpha;
  arguments.limit = layer_.limit;
  set_weights(arguments, buffers.up);
  arguments.x = pointer(buffers.x);
  arguments.y = workspace + at.middle;
  arguments.columns = layer_.hidden;
  arguments.outputs = layer_.intermediate;
  arguments.block = layer_.up_block;
  launch(up(size), arguments, stream);

  set_weights(arguments, buffers.down);
  arguments.x = arguments.y;
  arguments.y = workspace + at.outputs;
  arguments.columns = layer_.intermediate;
  arguments.outputs = layer_.hidden;
  arguments.block = layer_.down_block;
  launch(down(size), arguments, stream);

  arguments.hidden = layer_.hidden;
  arguments.out = pointer(buffers.out);
  launch(kernels_[kCombine], arguments, stream);
}

}  // namespace rq
