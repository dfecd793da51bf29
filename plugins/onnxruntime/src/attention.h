// What a step of attention reads and writes, for one token of each sequence (attention_decode.cc) and for several
// (attention_prefill.cc).
#pragma once

#include <algorithm>
#include <cmath>
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

// The sizes of a step, from checked inputs. `name`: that of `past`.
inline Sizes sizes_of(int64_t heads, int64_t kv_heads, const Tensor& query, const Tensor& past, const char* name,
                      const Tensor& mask) {
  Sizes s{query.dim(0), query.dim(1), heads, kv_heads, heads / kv_heads, past.dim(2), mask.dim(3), 0};
  s.length = std::max(s.past, s.total);
  require((mask.dim(0) == s.sequences || mask.dim(0) == 1) && mask.dim(1) == 1 && (mask.dim(2) == s.steps || mask.dim(2) == 1),
          "mask has the shape [", mask.dim(0), ", ", mask.dim(1), ", ", mask.dim(2), ", ", s.total, "], which does not fit ",
          s.sequences, " sequences of ", s.steps, " tokens");
  require(s.total >= s.steps, "mask has ", s.total, " columns, fewer than the ", s.steps, " new tokens");
  require(s.past == s.total - s.steps || s.past >= s.total, name, " has ", s.past, " columns, but mask has ", s.total, " for ",
          s.steps, " new tokens: it must have ", s.total - s.steps, ", or ", s.total, " and more");
  return s;
}
inline void require_same_tokens(const char* name, const Tensor& tensor, const Sizes& s) {
  require(tensor.dim(0) == s.sequences && tensor.dim(1) == s.steps, name, " has ", tensor.dim(0), " x ", tensor.dim(1),
          " tokens, query ", s.sequences, " x ", s.steps);
}
inline void require_cache(const char* name, const Tensor& tensor, const Sizes& s, int64_t width) {
  require(tensor.dim(0) == s.sequences && tensor.dim(1) == s.kv_heads && tensor.dim(2) == s.past && tensor.dim(3) == width, name,
          " has the shape [", tensor.dim(0), ", ", tensor.dim(1), ", ", tensor.dim(2), ", ", tensor.dim(3), "], not [", s.sequences,
          ", ", s.kv_heads, ", ", s.past, ", ", width, "]");
}
inline void require_sinks(const Tensor& sinks, int64_t heads) {
  if (!sinks.present) return;
  require(sinks.type == kFloat && sinks.dim(0) == heads, "sinks is not one fp32 number for each of ", heads, " heads");
}

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
      std::copy_n(from, (old_end - columns.begin) * width, out + columns.begin * width);  // a width of 0 may come without memory
    }
    for (int64_t c = std::max(columns.begin, kept); c < columns.end; ++c) {
      const float* from = fresh + ((sequence * s.steps + c - kept) * s.kv_heads + head) * width;
      std::copy_n(from, width, out + c * width);
    }
  }
};

// The weighted sum of values `part` of a query becomes its output, for the largest score and the sum of weights. `sink`: a logit that
// counts in the sum alone, or nullptr.
inline void finish(float largest, float sum, const float* sink, const float* part, int64_t width, float* out) {
  float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (sink && sum != 0.0f) {
    const float most = std::max(largest, *sink), to_most = std::exp(largest - most);
    factor = to_most / (sum * to_most + std::exp(*sink - most));
  }
  for (int64_t i = 0; i < width; ++i) out[i] = part[i] * factor;
}

// Joins `count` parts of a query, of which each read other columns. Parts are `apart` numbers from each other: `rows` largest scores,
// as many sums of weights, and the sums of values of each row; the query is row `row`. `memory`: `width` numbers.
inline void join(const float* parts, int64_t count, int64_t apart, int64_t rows, int64_t row, const float* sink, int64_t width,
                 float* memory, float* out) {
  float largest = kNothing, sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, parts[i * apart + row]);
  std::fill(memory, memory + width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float* p = parts + i * apart;
    const float factor = p[row] == largest ? 1.0f : std::exp(p[row] - largest);
    sum += factor * p[rows + row];
    const float* numbers = p + 2 * rows + row * width;
    for (int64_t c = 0; c < width; ++c) memory[c] += factor * numbers[c];
  }
  finish(largest, sum, sink, memory, width, out);
}

// Writes all columns of `caches` after the step.
inline void fill_all(const Context& context, const Sizes& size, std::initializer_list<const Cache*> caches) {
  constexpr int64_t kColumns = 1024;  // of a task
  const int64_t pieces = (size.total + kColumns - 1) / kColumns;
  auto filled = [&](size_t index) {
    const int64_t i = static_cast<int64_t>(index), b = i / pieces / size.kv_heads, h = i / pieces % size.kv_heads;
    const int64_t begin = i % pieces * kColumns;
    for (const Cache* cache : caches) cache->fill(size, b, h, {begin, std::min(begin + kColumns, size.total)});
  };
  context.parallel(static_cast<size_t>(size.sequences * size.kv_heads * pieces), filled);
}

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
  const float* sink(int64_t head) const { return sinks ? sinks + head : nullptr; }
  float* output(int64_t sequence, int64_t step, int64_t head) const {
    return y + ((sequence * size.steps + step) * size.heads + head) * values.width;
  }
};

void decode(const Attention& attention, const Context& context);
void prefill(const Attention& attention, const Context& context);

}  // namespace rq
