// Latent attention with keys and values: for each head, blocks of queries read some columns, whose keys and values are computed of
// the latents once for all blocks. Columns are counted from the first that is read, and blocks of queries from the last token, so
// that padding before the first one changes nothing.
#include "latent.h"

namespace rq {
namespace {

constexpr int64_t kColumnsAtOnce = 512;  // that are expanded, to stay in the cache while all queries read them

struct Expanded : Latent {
  void attend(int64_t sequence, int64_t head) const {
    const Widths widths{nope, rope(), value};
    std::vector<QueryBlock> blocks;
    int64_t numbers = 0, scores_needed = 0;
    for (int64_t end = size.steps; end > 0; end -= kBlockRows) {
      blocks.emplace_back(kernels, mask, widths, sequence, Range{std::max<int64_t>(0, end - kBlockRows), end}, 1);
      numbers += blocks.back().queries() + blocks.back().results();
      scores_needed = std::max(scores_needed, blocks.back().scores());
    }
    const Range rows{key_rows(head).begin, value_rows(head).end};
    float *memory = scratch(numbers + scores_needed + kColumnsAtOnce * (nope + value) + products(rows, kBlockKeys)),
          *scores = memory + numbers, *keys = scores + scores_needed, *values = keys + kColumnsAtOnce * nope,
          *expansions = values + kColumnsAtOnce * value;
    for (QueryBlock& block : blocks) {
      block.begin(memory, memory + block.queries(), scale, [&](int64_t r) { return query_of(sequence, block.step(r), head); });
      memory += block.queries() + block.results();
    }
    const Range all = columns(sequence);
    const float* second = positions.head(size, sequence, 0);
    for (int64_t first = all.begin; first < all.end; first += kColumnsAtOnce) {
      const Range some{first, std::min(first + kColumnsAtOnce, all.end)};
      for (int64_t c = some.begin; c < some.end; c += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, some.end - c), place = c - first;
        expand(sequence, head, {c, c + count}, keys + place * nope, values + place * value, expansions);
      }
      for (const QueryBlock& block : blocks) {
        for (int64_t c = some.begin; c < std::min(some.end, block.columns().end); c += kBlockKeys) {
          const int64_t count = std::min(kBlockKeys, some.end - c), place = c - first;
          const Columns part{{c, c + count}, keys + place * nope, second + c * rope(), values + place * value};
          block.read(part, scores);
        }
      }
    }
    for (const QueryBlock& block : blocks) {
      for (int64_t r = 0; r < block.rows(); ++r) {
        finish(block.largest()[r], block.sums()[r], sink(head), block.out(r), value, output(sequence, block.step(r), head));
      }
    }
  }

  // The keys without position, and the values, of at most kBlockKeys columns.
  void expand(int64_t sequence, int64_t head, const Range& range, float* keys, float* values, float* products) const {
    const float *first = latents.head(size, sequence, 0) + range.begin * rank(), *rows[kBlockKeys];
    for (int64_t i = 0; i < range.count(); ++i) rows[i] = first + i * rank();
    multiply(rows, range.count(), key_rows(head), products, [&](int64_t i) { return keys + i * nope; });
    multiply(rows, range.count(), value_rows(head), products, [&](int64_t i) { return values + i * value; });
  }
};

}  // namespace

void expanded(const Latent& latent, const std::vector<int64_t>& sequences, const Context& context) {
  const Expanded expanded{latent};
  auto attend = [&](size_t index) {
    const int64_t i = static_cast<int64_t>(index);
    expanded.attend(sequences[static_cast<size_t>(i / latent.size.heads)], i % latent.size.heads);
  };
  context.parallel(sequences.size() * static_cast<size_t>(latent.size.heads), attend);
}

}  // namespace rq
