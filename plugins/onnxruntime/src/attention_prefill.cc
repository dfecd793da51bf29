// Attention of several new tokens of each sequence: a block of queries reads blocks of keys one after the other and keeps, for each
// query, the largest score m, the sum of e^(score - m) and the sum of values with these weights, which it scales whenever m grows
// (FlashAttention, arXiv 2205.14135). Blocks of keys are counted from the first column that is read, and those of queries from the
// last token, so that padding before the first one changes nothing.
#include "attention.h"

namespace rq {
namespace {

constexpr int64_t kBlockKeys = 64;
constexpr int64_t kBlockRows = 64;        // queries that share a pass over the keys: tokens times the heads of a group
constexpr int64_t kCopiedColumns = 1024;  // of a task that copies the past

bool all_finite(const float* numbers, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffffu);
  }
  return most < 0x7f800000u;
}

struct Prefill : Attention {
  // Steps of one sequence and the queries of one group: row r is query head r % group of step first + r / group.
  // Sixteen of them stand side by side, as a panel does.
  struct Block {
    int64_t sequence, head, first, rows, panels;
    float *queries, *scores, *largest, *sums, *out;
  };

  const MaskRow& mask_of(const Block& block, int64_t row) const { return mask(block.sequence, block.first + row / size.group); }

  void attend(int64_t sequence, int64_t head, Range steps) const {
    Block block{sequence, head, steps.begin, steps.count() * size.group, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
    block.panels = rounded_up(block.rows, kPanel) / kPanel;
    const int64_t rows = block.panels * kPanel;
    block.queries = scratch(rows * (keys.width + kBlockKeys + 2 + values.width));
    block.scores = block.queries + rows * keys.width;
    block.largest = block.scores + rows * kBlockKeys;
    block.sums = block.largest + rows;
    block.out = block.sums + rows;
    std::fill(block.largest, block.largest + rows, kNothing);
    std::fill(block.sums, block.sums + rows * (1 + values.width), 0.0f);
    pack(block);

    Range columns{size.total, 0};
    for (int64_t s = steps.begin; s < steps.end; ++s) {
      const MaskRow& row = mask(sequence, s);
      if (row.empty()) continue;
      columns = {std::min(columns.begin, row.columns.begin), std::max(columns.end, row.columns.end)};
    }
    for (int64_t c = columns.begin; c < columns.end; c += kBlockKeys) read(block, {c, std::min(c + kBlockKeys, columns.end)});
    for (int64_t r = 0; r < block.rows; ++r) {
      finish(sequence, steps.begin + r / size.group, head * size.group + r % size.group, block.largest[r], block.sums[r],
             block.out + r * values.width);
    }
  }

  // The queries as panels [keys.width][16], times the scale.
  void pack(const Block& block) const {
    for (int64_t p = 0; p < block.panels; ++p) {
      const float* from[kPanel];
      for (int64_t j = 0; j < kPanel; ++j) {  // the last row again in place of those that do not exist
        const int64_t r = std::min(p * kPanel + j, block.rows - 1);
        from[j] = query_of(block.sequence, block.first + r / size.group, block.head * size.group + r % size.group);
      }
      float* out = block.queries + p * kPanel * keys.width;
      for (int64_t c = 0; c < keys.width; ++c, out += kPanel) {
        for (int64_t j = 0; j < kPanel; ++j) out[j] = from[j][c] * scale;
      }
    }
  }

  // All rows of the block read these columns.
  void read(const Block& block, const Range& columns) const {
    thread_local std::vector<Range> runs;
    runs_of(block, columns, runs);
    const float *keys_begin = keys.head(size, block.sequence, block.head), *rows[kBlockKeys];
    int64_t count = 0, columns_of[kBlockKeys];
    for (const Range& run : runs) {
      for (int64_t c = run.begin; c < run.end; ++c) columns_of[count] = c, rows[count++] = keys_begin + c * keys.width;
    }
    const auto reads = [&](int64_t panel) {
      const int64_t end = std::min(block.rows, (panel + 1) * kPanel);
      for (int64_t r = panel * kPanel; r < end; ++r) {
        if (mask_of(block, r).meets(columns)) return true;
      }
      return false;
    };
    int64_t first = 0, last = block.panels;
    while (first < last && !reads(first)) ++first;
    while (last > first && !reads(last - 1)) --last;
    if (count == 0 || first == last) return;
    const Matrix queries{Storage::fp32, reinterpret_cast<const uint8_t*>(block.queries),
                         static_cast<size_t>(keys.width * kPanel) * sizeof(float), nullptr, keys.width, keys.width, 1};
    kernels.multiply_floats(rows, count, queries, first, last - first, block.scores);
    const bool finite = covered_by_all(block, columns) || all_finite(block, runs);
    for (int64_t p = first; p < last; ++p) {
      weigh(block, p, columns, runs, columns_of, count, finite, block.scores + (p - first) * count * kPanel);
    }
  }

  bool covered_by_all(const Block& block, const Range& columns) const {
    for (int64_t s = block.first; s < block.first + block.rows / size.group; ++s) {
      if (!mask(block.sequence, s).covers(columns)) return false;
    }
    return true;
  }

  bool all_finite(const Block& block, const std::vector<Range>& runs) const {
    const float* numbers = values.head(size, block.sequence, block.head);
    for (const Range& run : runs) {
      if (!rq::all_finite(numbers + run.begin * values.width, run.count() * values.width)) return false;
    }
    return true;
  }

  // The columns that any row of the block reads.
  void runs_of(const Block& block, const Range& columns, std::vector<Range>& runs) const {
    runs.clear();
    uint8_t read[kBlockKeys] = {};
    for (int64_t s = block.first + block.rows / size.group; s-- > block.first;) {  // the last step often reads all
      const MaskRow& row = mask(block.sequence, s);
      if (row.covers(columns)) return runs.push_back(columns);
      for (int64_t c = columns.begin; c < columns.end; ++c) read[c - columns.begin] |= row.read[c];
    }
    append_runs(read, {0, columns.count()}, runs);
    for (Range& run : runs) run = {run.begin + columns.begin, run.end + columns.begin};
  }

  // A panel of rows reads `count` columns, whose scores become weights.
  void weigh(const Block& block, int64_t panel, const Range& columns, const std::vector<Range>& runs, const int64_t* columns_of,
             int64_t count, bool finite, float* scores) const {
    const int64_t row = panel * kPanel, rows = std::min(kPanel, block.rows - row), width = values.width;
    for (int64_t j = 0; j < rows; ++j) {
      const MaskRow& of = mask_of(block, row + j);
      if (of.covers(columns)) continue;
      for (int64_t k = 0; k < count; ++k) {
        if (!of.read[columns_of[k]]) scores[k * kPanel + j] = kNothing;
      }
    }
    float *largest = block.largest + row, *sums = block.sums + row, *out = block.out + row * width;
    float factors[kPanel], added[kPanel];
    std::memcpy(factors, largest, sizeof factors);
    kernels.raise(scores, count, largest);
    kernels.exponentials(factors, 1, largest, added);
    kernels.exponentials(scores, count, largest, added);
    for (int64_t j = 0; j < kPanel; ++j) sums[j] = sums[j] * factors[j] + added[j];

    const float* values_begin = values.head(size, block.sequence, block.head);
    if (!finite) return weigh_each(block, panel, columns_of, count, scores, factors);
    for (const Range& run : runs) {
      kernels.weigh_values(scores, 1, kPanel, rows, values_begin + run.begin * width, run.count(), width, factors, out);
      scores += run.count() * kPanel;
      std::fill(factors, factors + kPanel, 1.0f);
    }
  }

  // The same for values of which some are not finite: a row must not read those that its mask excludes, which 0 would not silence.
  void weigh_each(const Block& block, int64_t panel, const int64_t* columns_of, int64_t count, const float* scores,
                  const float* factors) const {
    const float* values_begin = values.head(size, block.sequence, block.head);
    for (int64_t j = 0; j < kPanel && panel * kPanel + j < block.rows; ++j) {
      const MaskRow& row = mask_of(block, panel * kPanel + j);
      float factor = factors[j], *out = block.out + (panel * kPanel + j) * values.width;
      for (int64_t k = 0; k < count; ++k) {
        if (!row.read[columns_of[k]]) continue;
        const float* value = values_begin + columns_of[k] * values.width;
        kernels.weigh_values(scores + k * kPanel + j, 1, kPanel, 1, value, 1, values.width, &factor, out);
        factor = 1.0f;
      }
    }
  }

  void run(const Context& context) const {
    const int64_t heads = size.sequences * size.kv_heads, pieces = (size.total + kCopiedColumns - 1) / kCopiedColumns;
    auto filled = [&](size_t index) {
      const int64_t i = static_cast<int64_t>(index), b = i / pieces / size.kv_heads, h = i / pieces % size.kv_heads;
      const int64_t begin = i % pieces * kCopiedColumns;
      const Range columns{begin, std::min(begin + kCopiedColumns, size.total)};
      keys.fill(size, b, h, columns);
      values.fill(size, b, h, columns);
    };
    context.parallel(static_cast<size_t>(heads * pieces), filled);
    // From the last step on, so that the blocks are the same for any padding before the first one.
    const int64_t at_once = std::max<int64_t>(1, kBlockRows / size.group), blocks = (size.steps + at_once - 1) / at_once;
    auto block = [&](size_t index) {
      const int64_t i = static_cast<int64_t>(index), b = i / blocks / size.kv_heads, h = i / blocks % size.kv_heads;
      const int64_t end = size.steps - i % blocks * at_once;
      attend(b, h, {std::max<int64_t>(0, end - at_once), end});
    };
    context.parallel(static_cast<size_t>(heads * blocks), block);
  }
};

}  // namespace

void prefill(const Attention& attention, const Context& context) { Prefill{attention}.run(context); }

}  // namespace rq
