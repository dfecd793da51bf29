// CacheAttention: attention of new tokens to a cache of keys and values, which it extends by theirs.
//
// The softmax is computed in parts, as in FlashAttention (arXiv 2205.14135): a part has the sum of e^(score - m) and the sum of
// values with these weights, for its largest score m, and parts are joined by scaling them to a common m. A step of one token reads
// a sequence in chunks of keys (kChunkKeys), each a task, whose parts are joined at the end (flash decoding). Of more tokens, a
// block of rows reads blocks of keys (kBlockKeys) one after the other. Chunks and blocks are counted from the first column that is
// read, so that padding before it changes nothing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "arena.h"
#include "attention_mask.h"
#include "kernels.h"
#include "op.h"

namespace rq {
namespace {

constexpr int64_t kChunkKeys = 512;       // of a task of one token
constexpr int64_t kBlockKeys = 64;        // of a step of several tokens
constexpr int64_t kBlockRows = 64;        // queries that share a pass over the keys: tokens times the heads of a group
constexpr int64_t kCopiedColumns = 1024;  // of a task that only copies
constexpr int64_t kWorthATask = 65536;    // numbers of keys and values
constexpr float kNothing = -std::numeric_limits<float>::infinity();

int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Memory of a thread, kept from task to task; not initialized.
float* scratch(int64_t count) {
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

bool all_finite(const float* numbers, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffffu);
  }
  return most < 0x7f800000u;
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

  // ---- One token ----

  // Some keys of one head of one sequence.
  struct Chunk {
    int64_t sequence, head;
    Range columns;  // that are read
    Range written;  // of the present
    int64_t part;   // the number of its part, or -1 if it is the whole row
  };

  // For each query of the group: the largest score, the sum of weights, and the sum of weighted values.
  int64_t part_size() const { return size.group * (values.width + 2); }

  void attend(const Chunk& chunk, float* parts) const {
    const int64_t group = size.group, stride = rounded_up(chunk.columns.count(), kPanel) + kPanel;
    keys.fill(size, chunk.sequence, chunk.head, chunk.written);
    values.fill(size, chunk.sequence, chunk.head, chunk.written);
    float* queries = scratch(group * (keys.width + stride) + part_size());
    float *scores = queries + group * keys.width, *part = scores + group * stride;
    if (chunk.part >= 0) part = parts + chunk.part * part_size();
    float *largest = part, *sums = part + group, *out = part + 2 * group;
    const float* from = query_of(chunk.sequence, 0, chunk.head * group);
    for (int64_t i = 0; i < group * keys.width; ++i) queries[i] = from[i] * scale;

    thread_local std::vector<Range> runs;
    runs.clear();
    const MaskRow& row = mask(chunk.sequence, 0);
    if (row.covers(chunk.columns)) runs.push_back(chunk.columns);
    else append_runs(row.read, chunk.columns, runs);

    const float* key = keys.head(size, chunk.sequence, chunk.head);
    int64_t count = 0;
    for (const Range& run : runs) {
      kernels.dot_keys(queries, group, key + run.begin * keys.width, run.count(), keys.width, scores + count, stride);
      count += run.count();
    }
    for (int64_t r = 0; r < group; ++r) weights_of(scores + r * stride, count, largest[r], sums[r]);

    std::fill(out, out + group * values.width, 0.0f);
    const float* value = values.head(size, chunk.sequence, chunk.head);
    std::vector<float> ones(static_cast<size_t>(group), 1.0f);
    const float* weights = scores;
    for (const Range& run : runs) {
      const float* first = value + run.begin * values.width;
      kernels.weigh_values(weights, stride, 1, group, first, run.count(), values.width, ones.data(), out);
      weights += run.count();
    }
    if (chunk.part < 0) {
      for (int64_t r = 0; r < group; ++r) {
        finish(chunk.sequence, 0, chunk.head * group + r, largest[r], sums[r], out + r * values.width);
      }
    }
  }

  // The scores of one query become weights.
  void weights_of(float* scores, int64_t count, float& largest, float& sum) const {
    const int64_t vectors = rounded_up(count, kPanel) / kPanel;
    std::fill(scores + count, scores + vectors * kPanel, kNothing);
    float lanes[kPanel], totals[kPanel];
    std::fill(lanes, lanes + kPanel, kNothing);
    kernels.raise(scores, vectors, lanes);
    largest = *std::max_element(lanes, lanes + kPanel);
    std::fill(lanes, lanes + kPanel, largest);
    kernels.exponentials(scores, vectors, lanes, totals);
    sum = 0.0f;
    for (float total : totals) sum += total;
  }

  // Joins `count` parts of one head of one sequence.
  void join(int64_t sequence, int64_t head, const float* part, int64_t count) const {
    const int64_t group = size.group;
    float* sum_of_values = scratch(values.width);
    for (int64_t r = 0; r < group; ++r) {
      float largest = kNothing, sum = 0.0f;
      for (int64_t i = 0; i < count; ++i) largest = std::max(largest, part[i * part_size() + r]);
      std::fill(sum_of_values, sum_of_values + values.width, 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const float* p = part + i * part_size();
        const float factor = p[r] == largest ? 1.0f : std::exp(p[r] - largest);
        sum += factor * p[group + r];
        const float* numbers = p + 2 * group + r * values.width;
        for (int64_t c = 0; c < values.width; ++c) sum_of_values[c] += factor * numbers[c];
      }
      finish(sequence, 0, head * group + r, largest, sum, sum_of_values);
    }
  }

  void decode(const Context& context) const {
    std::vector<Chunk> chunks;
    struct Split {
      int64_t sequence, head, first, count;
    };
    std::vector<Split> splits;
    int64_t parts = 0;
    for (int64_t b = 0; b < size.sequences; ++b) {
      const Range columns = mask(b, 0).columns;
      const int64_t count = std::max<int64_t>(1, (columns.count() + kChunkKeys - 1) / kChunkKeys);
      for (int64_t h = 0; h < size.kv_heads; ++h) {
        if (count > 1) splits.push_back({b, h, parts, count});
        for (int64_t i = 0; i < count; ++i) {
          const int64_t begin = columns.begin + i * kChunkKeys, end = std::min(begin + kChunkKeys, columns.end);
          const Range written{i == 0 ? 0 : begin, i == count - 1 ? size.total : end};
          chunks.push_back({b, h, {begin, end}, written, count > 1 ? parts++ : -1});
        }
      }
    }
    Arena arena;
    const auto memory = arena.reserve<float>(parts * part_size());
    arena.allocate();
    const int64_t tasks = static_cast<int64_t>(chunks.size());
    const int64_t work = std::min(size.total, kChunkKeys) * (keys.width + values.width);
    const int64_t of_tile = std::max<int64_t>(1, kWorthATask / work);
    auto tile = [&](size_t index) {
      const int64_t first = static_cast<int64_t>(index) * of_tile, last = std::min(first + of_tile, tasks);
      for (int64_t i = first; i < last; ++i) attend(chunks[static_cast<size_t>(i)], memory.data());
    };
    context.parallel(static_cast<size_t>((tasks + of_tile - 1) / of_tile), tile);
    auto joined = [&](size_t index) {
      const Split& split = splits[index];
      join(split.sequence, split.head, memory.data() + split.first * part_size(), split.count);
    };
    context.parallel(splits.size(), joined);
  }

  // ---- Several tokens ----

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
    for (int64_t r = 0; r < block.panels * kPanel; ++r) {
      float* out = block.queries + r / kPanel * kPanel * keys.width + r % kPanel;
      if (r >= block.rows) {
        for (int64_t c = 0; c < keys.width; ++c) out[c * kPanel] = 0.0f;
        continue;
      }
      const float* from = query_of(block.sequence, block.first + r / size.group, block.head * size.group + r % size.group);
      for (int64_t c = 0; c < keys.width; ++c) out[c * kPanel] = from[c] * scale;
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
    for (int64_t p = first; p < last; ++p) {
      weigh(block, p, columns, runs, columns_of, count, block.scores + (p - first) * count * kPanel);
    }
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
             int64_t count, float* scores) const {
    const int64_t row = panel * kPanel, rows = std::min(kPanel, block.rows - row), width = values.width;
    bool covered = true;
    for (int64_t j = 0; j < rows; ++j) {
      const MaskRow& of = mask_of(block, row + j);
      if (of.covers(columns)) continue;
      covered = false;
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
    bool finite = true;
    for (const Range& run : runs) {
      finite = finite && (covered || all_finite(values_begin + run.begin * width, run.count() * width));
    }
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

  void prefill(const Context& context) const {
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

struct CacheAttention {
  static constexpr const char* kName = "CacheAttention";
  static constexpr int kInputs[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kBool};
  static constexpr int kOutputs[] = {kFloat, kFloat, kFloat};
  static constexpr size_t kOptionalInputs = 1;  // sinks

  int64_t heads, kv_heads;
  float scale;
  const Kernels& kernels;

  explicit CacheAttention(const Info& info)
      : heads(info.integer("num_heads")),
        kv_heads(info.integer("kv_num_heads")),
        scale(info.real("scale", std::numeric_limits<float>::quiet_NaN())),
        kernels(best_kernels()) {
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "num_heads is ", heads, ", not a multiple of kv_num_heads, ",
            kv_heads);
    require(std::isfinite(scale), "attribute scale is missing or not finite");
  }

  void compute(Context& context) const {
    const Tensor query = context.required(0, "query", 3), key = context.required(1, "key", 3),
                 value = context.required(2, "value", 3), past_key = context.required(3, "past_key", 4),
                 past_value = context.required(4, "past_value", 4), mask = context.required(5, "mask", 4),
                 sinks = context.input(6, "sinks", 1);
    const int64_t width = width_of("query", query, heads), value_width = width_of("value", value, kv_heads);
    require(width_of("key", key, kv_heads) == width, "query has ", width, " numbers for each head, key ", key.dim(2) / kv_heads);
    const Sizes size = sizes(query, past_key, mask);
    same_tokens("key", key, size), same_tokens("value", value, size);
    same_cache("past_key", past_key, size, width), same_cache("past_value", past_value, size, value_width);
    if (sinks.present) {
      require(sinks.type == kFloat && sinks.dim(0) == heads, "sinks is not one fp32 number for each of ", heads, " heads");
    }
    float* y = context.output<float>(0, {size.sequences, size.steps, heads * value_width});
    float* present_key = context.output<float>(1, {size.sequences, kv_heads, size.length, width});
    float* present_value = context.output<float>(2, {size.sequences, kv_heads, size.length, value_width});
    const Mask rows(mask);
    const Attention attention{kernels,
                              size,
                              scale,
                              query.as<float>(),
                              sinks.present ? sinks.as<float>() : nullptr,
                              rows,
                              Cache("key", size, past_key, key, present_key, width),
                              Cache("value", size, past_value, value, present_value, value_width),
                              y};
    if (size.sequences == 0) return;
    if (size.steps == 1) attention.decode(context);
    else attention.prefill(context);
  }

 private:
  static int64_t width_of(const char* name, const Tensor& tensor, int64_t heads) {
    require(tensor.dim(2) > 0 && tensor.dim(2) % heads == 0, name, " has ", tensor.dim(2), " columns, which do not divide into ",
            heads, " heads");
    return tensor.dim(2) / heads;
  }

  Sizes sizes(const Tensor& query, const Tensor& past_key, const Tensor& mask) const {
    Sizes s{query.dim(0), query.dim(1), heads, kv_heads, heads / kv_heads, past_key.dim(2), mask.dim(3), 0};
    s.length = std::max(s.past, s.total);
    require((mask.dim(0) == s.sequences || mask.dim(0) == 1) && mask.dim(1) == 1 && (mask.dim(2) == s.steps || mask.dim(2) == 1),
            "mask has the shape [", mask.dim(0), ", ", mask.dim(1), ", ", mask.dim(2), ", ", s.total, "], which does not fit ",
            s.sequences, " sequences of ", s.steps, " tokens");
    require(s.total >= s.steps, "mask has ", s.total, " columns, fewer than the ", s.steps, " new tokens");
    require(s.past == s.total - s.steps || s.past >= s.total, "past_key has ", s.past, " columns, but mask has ", s.total,
            " for ", s.steps, " new tokens: it must have ", s.total - s.steps, ", or ", s.total, " and more");
    return s;
  }
  static void same_tokens(const char* name, const Tensor& tensor, const Sizes& s) {
    require(tensor.dim(0) == s.sequences && tensor.dim(1) == s.steps, name, " has ", tensor.dim(0), " x ", tensor.dim(1),
            " tokens, query ", s.sequences, " x ", s.steps);
  }
  static void same_cache(const char* name, const Tensor& tensor, const Sizes& s, int64_t width) {
    require(tensor.dim(0) == s.sequences && tensor.dim(1) == s.kv_heads && tensor.dim(2) == s.past && tensor.dim(3) == width, name,
            " has the shape [", tensor.dim(0), ", ", tensor.dim(1), ", ", tensor.dim(2), ", ", tensor.dim(3), "], not [",
            s.sequences, ", ", s.kv_heads, ", ", s.past, ", ", width, "]");
  }
};

}  // namespace

OrtCustomOp* cache_attention_op() { return custom_op<CacheAttention>(); }

}  // namespace rq
