// Attention of one new token of each sequence (flash decoding): the keys of a sequence are read in chunks, each a task for all
// queries of a group. A chunk has, for each query, its largest score m, the sum of e^(score - m) and the sum of values with these
// weights. Such parts are joined in order by scaling them to a common m. Chunks are counted from the first column that is read, so
// that padding before it changes nothing.
#include "arena.h"
#include "attention.h"

namespace rq {
namespace {

constexpr int64_t kChunkNumbers = 65536;  // of the keys of a chunk
constexpr int64_t kLeastChunk = 512;      // keys
constexpr int64_t kWorthATask = 65536;    // numbers of keys and values

// The first 4 KiB from here on, while something else is computed.
void prefetch(const float* numbers) {
  for (int64_t i = 0; i < 1024; i += 16) __builtin_prefetch(numbers + i);
}

struct Decode : Attention {
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
    const int64_t group = size.group, stride = rounded_up(chunk.columns.count(), kPanel);
    keys.fill(size, chunk.sequence, chunk.head, chunk.written);
    values.fill(size, chunk.sequence, chunk.head, chunk.written);
    float* queries = scratch(group * (keys.width + stride + 1) + part_size());
    float *scores = queries + group * keys.width, *ones = scores + group * stride, *part = ones + group;
    std::fill(ones, ones + group, 1.0f);
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
    const float* value = values.head(size, chunk.sequence, chunk.head);
    if (count > 0) prefetch(value + runs.front().begin * values.width);
    for (int64_t r = 0; r < group; ++r) weights_of(scores + r * stride, count, largest[r], sums[r]);

    std::fill(out, out + group * values.width, 0.0f);
    const float* weights = scores;
    for (const Range& run : runs) {
      const float* first = value + run.begin * values.width;
      kernels.weigh_values(weights, stride, 1, group, first, run.count(), values.width, ones, out);
      weights += run.count();
    }
    if (chunk.part < 0) {
      for (int64_t r = 0; r < group; ++r) {
        const int64_t query_head = chunk.head * group + r;
        finish(largest[r], sums[r], sink(query_head), out + r * values.width, values.width, output(chunk.sequence, 0, query_head));
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

  void run(const Context& context) const {
    std::vector<Chunk> chunks;
    struct Split {
      int64_t sequence, head, first, count;
    };
    std::vector<Split> splits;
    int64_t parts = 0;
    const int64_t chunk = std::max(kLeastChunk, kChunkNumbers / keys.width);
    for (int64_t b = 0; b < size.sequences; ++b) {
      const Range columns = mask(b, 0).columns;
      const int64_t count = std::max<int64_t>(1, (columns.count() + chunk - 1) / chunk);
      for (int64_t h = 0; h < size.kv_heads; ++h) {
        if (count > 1) splits.push_back({b, h, parts, count});
        for (int64_t i = 0; i < count; ++i) {
          const int64_t begin = columns.begin + i * chunk, end = std::min(begin + chunk, columns.end);
          const Range written{i == 0 ? 0 : begin, i == count - 1 ? size.total : end};
          chunks.push_back({b, h, {begin, end}, written, count > 1 ? parts++ : -1});
        }
      }
    }
    Arena arena;
    const auto memory = arena.reserve<float>(parts * part_size());
    arena.allocate();
    const int64_t tasks = static_cast<int64_t>(chunks.size());
    const int64_t work = std::min(size.total, chunk) * (keys.width + values.width);
    const int64_t of_tile = std::max<int64_t>(1, kWorthATask / work);
    auto tile = [&](size_t index) {
      const int64_t first = static_cast<int64_t>(index) * of_tile, last = std::min(first + of_tile, tasks);
      for (int64_t i = first; i < last; ++i) attend(chunks[static_cast<size_t>(i)], memory.data());
    };
    context.parallel(static_cast<size_t>((tasks + of_tile - 1) / of_tile), tile);
    auto joined = [&](size_t index) {
      const Split& split = splits[index];
      const float* first = memory.data() + split.first * part_size();
      for (int64_t r = 0; r < size.group; ++r) {
        const int64_t head = split.head * size.group + r;
        join(first, split.count, part_size(), size.group, r, sink(head), values.width, scratch(values.width),
             output(split.sequence, 0, head));
      }
    };
    context.parallel(splits.size(), joined);
  }
};

}  // namespace

void decode(const Attention& attention, const Context& context) { Decode{attention}.run(context); }

}  // namespace rq
