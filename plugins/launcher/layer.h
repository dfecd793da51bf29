// One MoE layer by the built kernels: Dispatch, both products, Combine. docs/kernels.md has the contract.
// T tokens, k choices a token, P = T * k pairs, E logical experts, S slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../format_groups.h"
#include "kernels.h"

namespace rq {

enum class Float { kFp16, kBf16 };

// "none", "swiglu", ...: the place in this list is the kernels' code.
int activation_code(const std::string& name);  // -1: unknown
bool is_gated(int activation);

// What does not change between batches.
struct Layer {
  Float dtype = Float::kFp16;
  std::vector<int> formats;   // [S] places in kFormatGroups
  std::vector<float> shares;  // [S] calibrated part of all pairs that a slot gets; empty: all alike. Only for speed.
  int hidden = 0, intermediate = 0, experts = 0, width = 0, top_k = 0;
  int up_block = 0, down_block = 0;  // columns that share a scale; 0 without quantized slots
  int activation = 0;
  bool biased = false;
  float alpha = 1.702f, limit = 7.0f;

  int slots() const { return static_cast<int>(formats.size()); }
};

// Device pointers of one projection; null for what the layer has no use for.
struct Weights {
  const void* index = nullptr;  // i32 [S]: the place of each slot's matrix in its format's group
  const void *weights[kGroups] = {}, *scales[kGroups] = {};
  const void* bias = nullptr;
};

// Device pointers, all of them multiples of 16.
struct Buffers {
  const void *x, *ids, *gates, *replicas, *formats;
  Weights up, down;
  void *out, *workspace;
};

// Bytes of `workspace` for up to `tokens` tokens, whatever the tiles. Throws std::runtime_error if these are too many.
size_t workspace_bytes(const Layer& layer, int64_t tokens);

// The place in tile_sizes of the cheapest tiles for `pairs` pairs: the rule of rq_kernels/tiles.py.
size_t choose_tiles(const Layer& layer, int64_t pairs);

// Row tiles of the worst batch.
int64_t most_tiles(int64_t pairs, int64_t slots, int64_t rows_per_tile);

// The kernels of one layer.
class LayerKernels {
 public:
  // Finds them; needs no GPU. Throws std::invalid_argument if the sizes are not those of any kernel, or too many, or if this
  // library was built without one of them.
  explicit LayerKernels(const Layer& layer);

  // Loads them into the current context. Throws std::runtime_error.
  void load();

  // Queues the layer's launches, after load(). Neither allocates nor waits, so it may be captured in a CUDA graph.
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
