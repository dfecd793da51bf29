// What a step of attention reads and writes, for one token of each sequence (attention_decode.cc) and for several
// (attention_prefill.cc).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention_mask.h"
#include "kernels.h"
#include "op.h"

namespace rq {

constexpr float kNothing = -std::numeric_limits<float>::infinity();  // the largest of no scores

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Memory of a thread, kept from task to task; not initialized.
inline float* scratch(int64_t count) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory = std::vector<float>(static_cast<size_t>(count));
  return memory.data();
}

struct Sizes {
  int64_t sequences, steps, heads, kv_heads, group, past, total, length;  // columns: of the past, read, and of the present
};

// The keys or the values: past [sequences, kv_heads, past, width], fresh [sequences, steps, kv_heads * width] and present.
struct Cache {
  const float *past, *fresh;
  float* present;
  int64_t width;
  bool in_place;

  Cache(const char* name, const Sizes& s, const Tensor& past_tensor, const Tensor& fresh_tensor, float* out, int64_t columns)
      : past(past_tensor.as<float>()), fresh(fresh_tensor.as<float>()), present(out), width(columns) {
    const int64_t heads = s.sequences * s.kv_heads, held = heads * s.past * width, written = heads * s.length * width;
    in_place = past == present && (s.past == s.length || heads == 1);
    require(in_place || held == 0 || written == 0 || past + held <= present || present + written <= past, "present_", name,
            " overlaps past_", name, "; bind the same buffer, with room for ", s.total, " columns, or another one");
  }

  const float* head(const Sizes& s, int64_t sequence, int64_t head) const {
    return present + (sequence * s.kv_heads + head) * s.length * width;
  }
  // Writes these columns of the present.
  void fill(const Sizes& s, int64_t sequence, int64_t head, Range columns) const {
    const int64_t kept = s.total - s.steps, place = sequence * s.kv_heads + head;
    float* out = present + place * s.length * width;
    const int64_t old_end = std::min(columns.end, kept);
    if (!in_place && columns.begin < old_end) {
      const float* from = past + (place * s.past + columns.begin) * width;
      std::memcpy(out + columns.begin * width, from, static_cast<size_t>((old_end - columns.begin) * width) * sizeof(float));
    }
    for (int64_t c = std::max(columns.begin, kept); c < columns.end; ++c) {
      const float* from = fresh + ((sequence * s.steps + c - kept) * s.kv_heads + head) * width;
      std::memcpy(out + c * width, from, static_cast<size_t>(width) * sizeof(float));
    }
  }
};

struct Attention {
  const Kernels& kernels;
  Sizes size;
  float scale;
  const float* query;
  const float* sinks;  // nullptr: none
  const Mask& mask;
  Cache keys, values;
  float* y;

  const float* query_of(int64_t sequence, int64_t step, int64_t head) const {
    return query + ((sequence * size.steps + step) * size.heads + head) * keys.width;
  }

  // The weighted sum of the values `part`, for the largest score and the sum of weights, becomes the output.
  void finish(int64_t sequence, int64_t step, int64_t head, float largest, float sum, const float* part) const {
    float* out = y + ((sequence * size.steps + step) * size.heads + head) * values.width;
    float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (sinks && sum != 0.0f) {
      const float most = std::max(largest, sinks[head]), to_most = std::exp(largest - most);
      factor = to_most / (sum * to_most + std::exp(sinks[head] - most));
    }
    for (int64_t i = 0; i < values.width; ++i) out[i] = part[i] * factor;
  }
};

void decode(const Attention& attention, const Context& context);
void prefill(const Attention& attention, const Context& context);

}  // namespace rq
