// Runs one MoE layer with the built kernels: Dispatch, both products and Combine. docs/kernels.md describes the contract.
// T tokens, k choices per token, P = T * k pairs, E logical experts, S slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../format_groups.h"
#include "kernels.h"

namespace rq {

enum class Float { kFp16, kBf16 };

// The kernels' code for an activation ("none", "swiglu", ...); -1 if it is unknown.
int activation_code(const std::string& name);
bool is_gated(int activation);

// The properties of a layer that do not change between batches.
struct Layer {
  Float dtype = Float::kFp16;
  std::vector<int> formats;   // [S] indices into kFormatGroups
  std::vector<float> shares;  // [S] calibrated share of all pairs for each slot; empty: equal shares. Affects only speed.
  int hidden = 0, intermediate = 0, experts = 0, width = 0, top_k = 0;
  int up_block = 0, down_block = 0;  // columns that share a scale; 0 without quantized slots
  int activation = 0;
  bool biased = false;
  float alpha = 1.702f, limit = 7.0f;

  int slots() const { return static_cast<int>(formats.size()); }
};

// Device pointers of one projection. A tensor that the layer does not need is null.
struct Weights {
  const void* index = nullptr;  // int32 [S]: the index of each slot's matrix in its format group
  const void *weights[kGroups] = {}, *scales[kGroups] = {};
  const void* bias = nullptr;
};

// Device pointers, each aligned to 16 bytes.
struct Buffers {
  const void *x, *ids, *gates, *replicas, *formats;
  Weights up, down;
  void *out, *workspace;
};

// Bytes of `workspace` that suffice for up to `tokens` tokens, with tiles of any size. Throws std::runtime_error if there are too
// many tokens.
size_t workspace_bytes(const Layer& layer, int64_t tokens);

// The index in tile_sizes of the cheapest tile size for `pairs` pairs, by the rule of rq_kernels/tiles.py.
size_t choose_tiles(const Layer& layer, int64_t pairs);

// The most row tiles that any batch of `pairs` pairs needs.
int64_t most_tiles(int64_t pairs, int64_t slots, int64_t rows_per_tile);

// The kernels of one layer.
class LayerKernels {
 public:
  // Finds the kernels; this needs no GPU. Throws std::invalid_argument if no kernel supports the layer's sizes, or if this
  // library was built without one of the kernels.
  explicit LayerKernels(const Layer& layer);

  // Loads them into the current context. Throws std::runtime_error.
  void load();

  // Queues the layer's launches; call load() before. It neither allocates nor waits, so a CUDA graph can capture it.
  // Throws std::runtime_error.
  void run(int64_t tokens, const Buffers& buffers, CUstream stream) const;

 private:
  enum { kCount, kScan, kScatter, kSmall, kCombine, kFixed };
  const Loaded& up(size_t size) const { return kernels_[kFixed + 2 * size]; }
  const Loaded& down(size_t size) const { return kernels_[kFixed + 2 * size + 1]; }

  Layer layer_;
  std::vector<Loaded> kernels_;
};

}  // namespace rq
