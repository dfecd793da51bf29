// Latent attention over the latents themselves: the weights of the keys are multiplied into the queries, which then have one key
// head in common, whose keys are the latent and the position and whose values are the latent; the weights of the values multiply
// the result. The columns of a single new token are read in chunks, each a task for all heads, whose parts are joined in order.
// Columns are counted from the first that is read, so that padding before it changes nothing.
#include "arena.h"
#include "latent.h"

namespace rq {
namespace {

constexpr int64_t kChunk = 256;          // columns
constexpr int64_t kTokensAtOnce = 64;    // whose results are multiplied by the weights of the values

struct Absorbed : Latent {
  const std::vector<int64_t>& sequences;
  float* queries;  // [those sequences, steps, heads, rank + rope]
  float* results;  // [those sequences, steps, heads, rank]

  int64_t tokens() const { return static_cast<int64_t>(sequences.size()) * size.steps; }
  int64_t sequence(int64_t token) const { return sequences[static_cast<size_t>(token / size.steps)]; }
  int64_t place(int64_t token, int64_t head) const { return token * size.heads + head; }
  Widths widths() const { return {rank(), rope(), rank()}; }

  // The queries of a head times the weights of its keys.
  void absorb(int64_t head) const {
    const Range rows = key_rows(head), panels = panels_of(rows);
    const int64_t columns = panels.count() * kPanel, lead = rows.begin - panels.begin * kPanel, width = rank() + rope();
    float *wide = scratch(columns * (rank() + tokens())), *padded = wide + columns * rank();
    kernels.convert(weights, panels.begin, panels.count(), wide);
    std::fill(padded, padded + tokens() * columns, 0.0f);
    for (int64_t t = 0; t < tokens(); ++t) {
      const float* from = query_of(sequence(t), t % size.steps, head);
      std::copy_n(from, nope, padded + t * columns + lead);
      std::copy_n(from + nope, rope(), queries + place(t, head) * width + rank());
    }
    kernels.dot_keys(padded, tokens(), wide, rank(), columns, queries + head * width, size.heads * width);
  }

  // The results of a head times the weights of its values.
  void project(int64_t head) const {
    const Range rows = value_rows(head);
    float* products = scratch(Latent::products(rows, kTokensAtOnce));
    const float* from[kTokensAtOnce];
    for (int64_t first = 0; first < tokens(); first += kTokensAtOnce) {
      const int64_t count = std::min(kTokensAtOnce, tokens() - first);
      for (int64_t i = 0; i < count; ++i) from[i] = results + place(first + i, head) * rank();
      multiply(from, count, rows, products, [&](int64_t i) {
        return output(sequence(first + i), (first + i) % size.steps, head);
      });
    }
  }

  // Steps of sequence sequences[number] read these columns. A block is rows of all heads.
  QueryBlock block_of(int64_t number, const Range& steps) const {
    return {kernels, mask, widths(), sequences[static_cast<size_t>(number)], steps, size.heads};
  }
  void read(QueryBlock& block, int64_t number, const Range& columns, float* results_of_block) const {
    float *packed = scratch(block.queries() + block.scores()), *scores = packed + block.queries();
    block.begin(packed, results_of_block, scale, [&](int64_t r) {
      return queries + place(number * size.steps + block.step(r), r % size.heads) * (rank() + rope());
    });
    const int64_t b = sequences[static_cast<size_t>(number)];
    const float *latent = latents.head(size, b, 0), *second = positions.head(size, b, 0);
    for (int64_t c = columns.begin; c < columns.end; c += kBlockKeys) {
      const float* first = latent + c * rank();
      block.read({{c, std::min(c + kBlockKeys, columns.end)}, first, second + c * rope(), first}, scores);
    }
  }

  // One new token of each sequence.
  void decode(const Context& context) const {
    struct Chunk {
      int64_t number;
      Range columns;
    };
    std::vector<Chunk> chunks;
    std::vector<int64_t> first_chunk;  // of each sequence
    for (int64_t n = 0; n < tokens(); ++n) {
      const Range all = block_of(n, {0, 1}).columns();
      first_chunk.push_back(static_cast<int64_t>(chunks.size()));
      for (int64_t c = all.begin; c < all.end; c += kChunk) chunks.push_back({n, {c, std::min(c + kChunk, all.end)}});
    }
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    const QueryBlock any = block_of(0, {0, 1});
    Arena arena;
    const auto parts = arena.reserve<float>(static_cast<int64_t>(chunks.size()) * any.results());
    arena.allocate();
    auto attend = [&](size_t index) {
      QueryBlock block = block_of(chunks[index].number, {0, 1});
      read(block, chunks[index].number, chunks[index].columns, parts.data() + static_cast<int64_t>(index) * block.results());
    };
    context.parallel(chunks.size(), attend);
    auto joined = [&](size_t index) {
      const int64_t head = static_cast<int64_t>(index);
      for (int64_t n = 0; n < tokens(); ++n) {
        const int64_t first = first_chunk[static_cast<size_t>(n)], count = first_chunk[static_cast<size_t>(n + 1)] - first;
        join(parts.data() + first * any.results(), count, any.results(), any.padded_rows(), head, sink(head), rank(),
             scratch(rank()), results + place(n, head) * rank());
      }
      project(head);
    };
    context.parallel(static_cast<size_t>(size.heads), joined);
  }

  // Several new tokens of each sequence.
  void prefill(const Context& context) const {
    const int64_t at_once = std::max<int64_t>(1, kBlockRows / size.heads), blocks = (size.steps + at_once - 1) / at_once;
    auto attend = [&](size_t index) {
      const int64_t i = static_cast<int64_t>(index), n = i / blocks, end = size.steps - i % blocks * at_once;
      QueryBlock block = block_of(n, {std::max<int64_t>(0, end - at_once), end});
      thread_local std::vector<float> memory;
      memory.resize(static_cast<size_t>(block.results()));
      read(block, n, block.columns(), memory.data());
      for (int64_t r = 0; r < block.rows(); ++r) {
        const int64_t head = r % size.heads;
        finish(block.largest()[r], block.sums()[r], sink(head), block.out(r), rank(),
               results + place(n * size.steps + block.step(r), head) * rank());
      }
    };
    context.parallel(sequences.size() * static_cast<size_t>(blocks), attend);
    auto projected = [&](size_t index) { project(static_cast<int64_t>(index)); };
    context.parallel(static_cast<size_t>(size.heads), projected);
  }
};

}  // namespace

void absorbed(const Latent& latent, const std::vector<int64_t>& sequences, const Context& context) {
  if (sequences.empty()) return;
  Arena arena;
  const int64_t rows = static_cast<int64_t>(sequences.size()) * latent.size.steps * latent.size.heads;
  const auto queries = arena.reserve<float>(rows * (latent.rank() + latent.rope()));
  const auto results = arena.reserve<float>(rows * latent.rank());
  arena.allocate();
  const Absorbed absorbed{latent, sequences, queries.data(), results.data()};
  auto absorb = [&](size_t index) { absorbed.absorb(static_cast<int64_t>(index)); };
  context.parallel(static_cast<size_t>(latent.size.heads), absorb);
  if (latent.size.steps == 1) absorbed.decode(context);
  else absorbed.prefill(context);
}

}  // namespace rq
