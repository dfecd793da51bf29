// Attention of several new tokens of each sequence: a block of queries reads blocks of keys one after the other (attention_block.h).
// Blocks of keys are counted from the first column that is read, and those of queries from the last token, so that padding before
// the first one changes nothing.
#include "attention_block.h"

namespace rq {
namespace {

struct Prefill : Attention {
  void attend(int64_t sequence, int64_t head, Range steps) const {
    QueryBlock block(kernels, mask, {keys.width, 0, values.width}, sequence, steps, size.group);
    float *queries = scratch(block.queries() + block.results() + block.scores()), *results = queries + block.queries(),
          *scores = results + block.results();
    block.begin(queries, results, scale, [&](int64_t r) {
      return query_of(sequence, block.step(r), head * size.group + r % size.group);
    });
    const float *key = keys.head(size, sequence, head), *value = values.head(size, sequence, head);
    const Range all = block.columns();
    for (int64_t c = all.begin; c < all.end; c += kBlockKeys) {
      const Range range{c, std::min(c + kBlockKeys, all.end)};
      block.read({range, key + c * keys.width, nullptr, value + c * values.width}, scores);
    }
    for (int64_t r = 0; r < block.rows(); ++r) {
      const int64_t query_head = head * size.group + r % size.group;
      finish(block.largest()[r], block.sums()[r], sink(query_head), block.out(r), values.width,
             output(sequence, block.step(r), query_head));
    }
  }

  void run(const Context& context) const {
    fill_all(context, size, {&keys, &values});
    // From the last step on, so that the blocks are the same for any padding before the first one.
    const int64_t heads = size.sequences * size.kv_heads;
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
