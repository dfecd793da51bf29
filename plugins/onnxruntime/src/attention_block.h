// Some queries that read keys block by block and keep, for each query, the largest score m, the sum of e^(score - m) and the sum of
// values with these weights, which are scaled whenever m grows (FlashAttention, arXiv 2205.14135).
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"

namespace rq {

constexpr int64_t kBlockKeys = 64;  // that are read at once
constexpr int64_t kBlockRows = 64;  // queries that share a pass over the keys: tokens times the heads of a group

// Numbers of a key, in two parts of which the second may be empty, and of a value.
struct Widths {
  int64_t key, second, value;
  int64_t query() const { return key + second; }
};

// The keys and values of some neighbouring columns, one after the other.
struct Columns {
  Range range;
  const float *keys, *second, *values;
};

// Row r is query r % group of step steps.begin + r / group. Sixteen rows stand side by side, as a panel does.
class QueryBlock {
 public:
  QueryBlock(const Kernels& kernels, const Mask& mask, const Widths& widths, int64_t sequence, Range steps, int64_t group)
      : kernels_(kernels), mask_(mask), widths_(widths), sequence_(sequence), steps_(steps), group_(group) {
    columns_ = {INT64_MAX, 0};
    for (int64_t s = steps.begin; s < steps.end; ++s) {
      const MaskRow& row = mask(sequence, s);
      if (row.empty()) continue;
      columns_ = {std::min(columns_.begin, row.columns.begin), std::max(columns_.end, row.columns.end)};
    }
    if (columns_.begin > columns_.end) columns_ = {0, 0};
  }

  int64_t rows() const { return steps_.count() * group_; }
  int64_t padded_rows() const { return rounded_up(rows(), kPanel); }
  Range columns() const { return columns_; }  // from the first to the last that a row reads
  int64_t step(int64_t row) const { return steps_.begin + row / group_; }

  // Numbers of its results: `padded_rows` largest scores and as many sums of weights, and the sums of values, a row after the other.
  int64_t results() const { return padded_rows() * (2 + widths_.value); }
  // Numbers of its memory, and of the memory that `read` needs, which several blocks can share.
  int64_t queries() const { return padded_rows() * widths_.query(); }
  int64_t scores() const { return padded_rows() * kBlockKeys * (widths_.second ? 2 : 1); }

  const float* largest() const { return largest_; }
  const float* sums() const { return sums_; }
  const float* out(int64_t row) const { return out_ + row * widths_.value; }

  // Begins with the queries query_of(row), times `scale`.
  template <typename QueryOf>
  void begin(float* queries, float* results, float scale, QueryOf query_of) {
    queries_ = queries;
    largest_ = results;
    sums_ = largest_ + padded_rows();
    out_ = sums_ + padded_rows();
    std::fill(largest_, largest_ + padded_rows(), kNothing);
    std::fill(sums_, sums_ + padded_rows() * (1 + widths_.value), 0.0f);
    for (int64_t first = 0; first < padded_rows(); first += kPanel, queries += kPanel * widths_.query()) {
      const float* from[kPanel];
      for (int64_t j = 0; j < kPanel; ++j) from[j] = query_of(std::min(first + j, rows() - 1));  // the last row again
      for (int64_t c = 0; c < widths_.query(); ++c) {
        for (int64_t j = 0; j < kPanel; ++j) queries[c * kPanel + j] = from[j][c] * scale;
      }
    }
  }

  // All rows read these columns, at most kBlockKeys.
  void read(const Columns& columns, float* scores) const {
    const Range& range = columns.range;
    thread_local std::vector<Range> runs;
    runs_of(range, runs);
    const float *keys[kBlockKeys], *second[kBlockKeys];
    int64_t count = 0, places[kBlockKeys];  // counted from the first column
    for (const Range& run : runs) {
      for (int64_t c = run.begin; c < run.end; ++c, ++count) {
        places[count] = c, keys[count] = columns.keys + c * widths_.key, second[count] = columns.second + c * widths_.second;
      }
    }
    int64_t first = 0, last = padded_rows() / kPanel;
    while (first < last && !meets(first, range)) ++first;
    while (last > first && !meets(last - 1, range)) --last;
    if (count == 0 || first == last) return;
    kernels_.multiply_floats(keys, count, part(0, widths_.key), first, last - first, scores);
    const int64_t numbers = (last - first) * count * kPanel;
    if (widths_.second) {
      float* more = scores + numbers;
      kernels_.multiply_floats(second, count, part(widths_.key, widths_.second), first, last - first, more);
      for (int64_t i = 0; i < numbers; ++i) scores[i] += more[i];
    }
    const bool finite = covered_by_all(range) || all_finite(columns, runs);
    for (int64_t p = first; p < last; ++p) weigh(p, columns, runs, places, count, finite, scores + (p - first) * count * kPanel);
  }

 private:
  const MaskRow& mask_of(int64_t row) const { return mask_(sequence_, step(row)); }

  // The queries' numbers from `begin` on as a matrix.
  Matrix part(int64_t begin, int64_t count) const {
    const size_t panel_bytes = static_cast<size_t>(widths_.query() * kPanel) * sizeof(float);
    return {Storage::fp32, reinterpret_cast<const uint8_t*>(queries_ + begin * kPanel), panel_bytes, nullptr, count, count, 1};
  }

  bool meets(int64_t panel, const Range& range) const {
    const int64_t end = std::min(rows(), (panel + 1) * kPanel);
    for (int64_t r = panel * kPanel; r < end; ++r) {
      if (mask_of(r).meets(range)) return true;
    }
    return false;
  }

  bool covered_by_all(const Range& range) const {
    for (int64_t s = steps_.begin; s < steps_.end; ++s) {
      if (!mask_(sequence_, s).covers(range)) return false;
    }
    return true;
  }

  bool all_finite(const Columns& columns, const std::vector<Range>& runs) const {
    uint32_t most = 0;
    for (const Range& run : runs) {
      const float *number = columns.values + run.begin * widths_.value, *end = columns.values + run.end * widths_.value;
      for (; number < end; ++number) {
        uint32_t bits;
        std::memcpy(&bits, number, sizeof bits);
        most = std::max(most, bits & 0x7fffffffu);
      }
    }
    return most < 0x7f800000u;
  }

  // Which columns of `range` any row reads, counted from its first one.
  void runs_of(const Range& range, std::vector<Range>& runs) const {
    runs.clear();
    uint8_t read[kBlockKeys] = {};
    for (int64_t s = steps_.end; s-- > steps_.begin;) {  // the last step often reads all
      const MaskRow& row = mask_(sequence_, s);
      if (row.covers(range)) return runs.push_back({0, range.count()});
      for (int64_t c = range.begin; c < range.end; ++c) read[c - range.begin] |= row.read[c];
    }
    append_runs(read, {0, range.count()}, runs);
  }

  // A panel of rows reads `count` columns, whose scores become weights.
  void weigh(int64_t panel, const Columns& columns, const std::vector<Range>& runs, const int64_t* places, int64_t count,
             bool finite, float* scores) const {
    const int64_t row = panel * kPanel, rows_here = std::min(kPanel, rows() - row), width = widths_.value;
    for (int64_t j = 0; j < rows_here; ++j) {
      const MaskRow& of = mask_of(row + j);
      if (of.covers(columns.range)) continue;
      for (int64_t k = 0; k < count; ++k) {
        if (!of.read[columns.range.begin + places[k]]) scores[k * kPanel + j] = kNothing;
      }
    }
    float *largest = largest_ + row, *sums = sums_ + row, *out = out_ + row * width;
    float factors[kPanel], added[kPanel];
    std::memcpy(factors, largest, sizeof factors);
    kernels_.raise(scores, count, largest);
    kernels_.exponentials(factors, 1, largest, added);
    kernels_.exponentials(scores, count, largest, added);
    for (int64_t j = 0; j < kPanel; ++j) sums[j] = sums[j] * factors[j] + added[j];

    if (!finite) return weigh_each(panel, columns, places, count, scores, factors);
    for (const Range& run : runs) {
      const float* values = columns.values + run.begin * width;
      kernels_.weigh_values(scores, 1, kPanel, rows_here, values, run.count(), width, factors, out);
      scores += run.count() * kPanel;
      std::fill(factors, factors + kPanel, 1.0f);
    }
  }

  // The same for values of which some are not finite: a row must not read those that its mask excludes, which 0 would not silence.
  void weigh_each(int64_t panel, const Columns& columns, const int64_t* places, int64_t count, const float* scores,
                  const float* factors) const {
    for (int64_t j = 0; j < kPanel && panel * kPanel + j < rows(); ++j) {
      const MaskRow& row = mask_of(panel * kPanel + j);
      float factor = factors[j], *out = out_ + (panel * kPanel + j) * widths_.value;
      for (int64_t k = 0; k < count; ++k) {
        if (!row.read[columns.range.begin + places[k]]) continue;
        const float* value = columns.values + places[k] * widths_.value;
        kernels_.weigh_values(scores + k * kPanel + j, 1, kPanel, 1, value, 1, widths_.value, &factor, out);
        factor = 1.0f;
      }
    }
  }

  const Kernels& kernels_;
  const Mask& mask_;
  Widths widths_;
  int64_t sequence_;
  Range steps_;
  int64_t group_;
  Range columns_;
  float *queries_ = nullptr, *largest_ = nullptr, *sums_ = nullptr, *out_ = nullptr;
};

}  // namespace rq
