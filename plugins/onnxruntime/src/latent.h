// What a step of latent attention reads and writes (DeepSeek-V2, arXiv 2405.04434, section 2.1), in its two forms: with the keys'
// weights multiplied into the queries (attention_absorbed.cc), and with keys and values computed of the latents
// (attention_expanded.cc).
#pragma once

#include <algorithm>
#include <vector>

#include "attention_block.h"

namespace rq {

struct Latent {
  const Kernels& kernels;
  Sizes size;  // kv_heads is 1
  int64_t nope, value;  // numbers of a head's key without position, and of its value
  float scale;
  const float* query;  // [sequences, steps, heads, nope + positions.width]
  const float* sinks;  // [heads], or nullptr
  const Mask& mask;
  Cache latents, positions;
  Matrix weights;  // of each head, `nope` rows that give the first part of a key, and `value` rows; latents.width columns
  float* y;        // [sequences, steps, heads, value]

  int64_t rank() const { return latents.width; }
  int64_t rope() const { return positions.width; }
  Range key_rows(int64_t head) const { return {head * (nope + value), head * (nope + value) + nope}; }
  Range value_rows(int64_t head) const { return {key_rows(head).end, key_rows(head).end + value}; }
  const float* query_of(int64_t sequence, int64_t step, int64_t head) const {
    return query + ((sequence * size.steps + step) * size.heads + head) * (nope + rope());
  }
  const float* sink(int64_t head) const { return sinks ? sinks + head : nullptr; }
  float* output(int64_t sequence, int64_t step, int64_t head) const {
    return y + ((sequence * size.steps + step) * size.heads + head) * value;
  }
  // The columns that any query of the sequence reads.
  Range columns(int64_t sequence) const {
    return QueryBlock(kernels, mask, {1, 0, 1}, sequence, {0, size.steps}, 1).columns();
  }

  // Panels that hold these rows of the weights, and the numbers of `products` for some latents.
  static Range panels_of(const Range& rows) { return {rows.begin / kPanel, (rows.end + kPanel - 1) / kPanel}; }
  static int64_t products(const Range& rows, int64_t count) { return panels_of(rows).count() * kPanel * count; }

  // out(i)[n] = the product of row rows.begin + n of the weights and latent x[i], for i < count.
  template <typename Out>
  void multiply(const float* const* x, int64_t count, const Range& rows, float* products, Out out) const {
    const Range panels = panels_of(rows);
    kernels.multiply_floats(x, count, weights, panels.begin, panels.count(), products);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t begin = std::max(rows.begin, p * kPanel), end = std::min(rows.end, (p + 1) * kPanel);
      const float* from = products + (p - panels.begin) * count * kPanel + begin - p * kPanel;
      for (int64_t i = 0; i < count; ++i, from += kPanel) std::copy_n(from, end - begin, out(i) + begin - rows.begin);
    }
  }
};

// Each for the sequences of which it is given the numbers. The caches are filled.
void absorbed(const Latent& latent, const std::vector<int64_t>& sequences, const Context& context);
void expanded(const Latent& latent, const std::vector<int64_t>& sequences, const Context& context);

}  // namespace rq
