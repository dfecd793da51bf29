// ExchangeDispatch: sends each (token, choice) row to the rank of its slot. ExchangeReturn: brings the results back.
//
// Every rank knows the counts of all ranks, so the j-th arrival of an expert over all ranks, counted rank by rank, takes copy
// j mod c. From the counts a rank also knows how many rows it gets from whom for which of its slots; only rows are sent.
//
// Rows travel sorted by rank, then slot, then pair. A rank gets those of rank 0 first, then those of rank 1, ...
//
// Slots from `computed` on are those of constant experts. Their pairs are counted, but no rows are sent: each rank adds the
// constants of its own pairs (Combine).
#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "ranks.h"

namespace rq {
namespace {

using Counts = std::vector<int32_t>;

// Memory that calls of all layers share. It keeps the size of the largest.
struct Scratch {
  std::vector<float> rows;
  Counts counted, counted_everywhere, copies, arrivals, place_of, next, from;
};

Scratch& scratch() {
  static Scratch shared;
  return shared;
}

void copy_row(const float* from, int64_t columns, float* to) {
  std::memcpy(to, from, static_cast<size_t>(columns) * sizeof(float));
}

// How many of the first `arrivals` of an expert with `copies` go to copy `number`.
int32_t taken(int32_t arrivals, int32_t number, int32_t copies) { return (arrivals + copies - 1 - number) / copies; }

struct ExchangeDispatch {
  static constexpr const char* kName = "ExchangeDispatch";
  static constexpr int kInputs[] = {kFloat, kInt64, kInt32, kInt64};
  static constexpr int kOutputs[] = {kFloat, kInt32, kInt32, kInt32, kInt32};
  static constexpr size_t kOptionalInputs = 0;

  Ranks& ranks;
  int64_t slots, computed;
  std::vector<int64_t> rank_of;  // each slot's
  Counts place;                  // of each slot when they are sorted by rank, those of constant experts last
  Counts own;                    // the slots of this rank

  explicit ExchangeDispatch(const Info& info) : ranks(Ranks::all()), rank_of(info.integers("ranks")) {
    slots = static_cast<int64_t>(rank_of.size());
    computed = info.integer("computed", slots);
    require(computed >= 0 && computed <= slots, "attribute computed is ", computed, " of ", slots, " slots");
    const int64_t rank = info.integer("rank"), size = info.integer("size");
    require(size == ranks.size(), "the graph is for ", size, " ranks, but ", ranks.size(), " processes were started");
    require(rank == ranks.rank(), "the graph is that of rank ", rank, ", not of rank ", ranks.rank());
    for (int64_t r : rank_of) require(r >= 0 && r < size, "attribute ranks has rank ", r, ", outside 0..", size - 1);
    Counts sorted(slots);
    std::iota(sorted.begin(), sorted.end(), 0);
    std::stable_sort(sorted.begin(), sorted.begin() + computed, [&](int32_t a, int32_t b) { return rank_of[a] < rank_of[b]; });
    place.resize(slots);
    for (int32_t i = 0; i < slots; ++i) {
      place[sorted[i]] = i;
      if (rank_of[sorted[i]] == rank) own.push_back(sorted[i]);
    }
  }

  // Outputs: the rows that arrived [N, H]; their order by slot [N], as ExpertGemm takes it; the own slots' offsets [L + 1]; the
  // pair of each row that leaves, in the order of leaving, then the other pairs [T * k]; rows sent to each rank and received from
  // it [2, R].
  void compute(Context& context) const {
    const std::lock_guard<std::mutex> turn(ranks.turn());
    const Tensor x = context.required(0, "x", 2), ids = context.required(1, "ids", 2);
    const Tensor replicas = context.required(2, "replicas", 2), idle = context.required(3, "idle", 1);
    const int64_t tokens = ids.dim(0), top_k = ids.dim(1), columns = x.dim(1), experts = replicas.dim(0), width = replicas.dim(1);
    require(x.dim(0) == tokens, "x has ", x.dim(0), " rows for ", tokens, " rows of ids");
    require(tokens * top_k < INT32_MAX, tokens * top_k, " (token, choice) pairs do not fit int32; use a smaller batch");
    require(idle.dim(0) == 1, "idle has ", idle.dim(0), " entries, not one");
    const int64_t pairs = *idle.as<int64_t>() ? 0 : tokens * top_k;  // a rank that only takes part sends no rows
    const int64_t* id = ids.as<int64_t>();
    const int32_t* table = replicas.as<int32_t>();
    const int size = ranks.size(), me = ranks.rank();
    Scratch& s = scratch();

    s.counted.assign(experts, 0);
    for (int64_t p = 0; p < pairs; ++p) {
      require(id[p] >= 0 && id[p] < experts, "expert id ", id[p], " is outside 0..", experts - 1);
      ++s.counted[id[p]];
    }
    s.counted_everywhere.resize(experts * size);
    ranks.gather(s.counted.data(), static_cast<int>(experts), s.counted_everywhere.data());
    count_copies(table, experts, width, s.copies);

    // Pairs sorted by the place of their slot.
    int32_t* outgoing = context.output<int32_t>(3, {tokens * top_k});
    int32_t* exchanged = context.output<int32_t>(4, {2, size});
    int32_t *sent = exchanged, *received = exchanged + size;
    std::fill_n(exchanged, 2 * size, 0);
    s.arrivals.assign(experts, 0);
    for (int q = 0; q < me; ++q) {
      for (int64_t e = 0; e < experts; ++e) s.arrivals[e] += s.counted_everywhere[q * experts + e];
    }
    s.place_of.resize(pairs);
    s.next.assign(slots + 1, 0);
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t e = id[p];
      require(s.copies[e] > 0, "expert ", e, " has no slot in replicas");
      const int32_t slot = table[e * width + s.arrivals[e]++ % s.copies[e]];
      s.place_of[p] = place[slot];
      ++s.next[place[slot] + 1];
      sent[rank_of[slot]] += slot < computed;
    }
    std::partial_sum(s.next.begin(), s.next.end(), s.next.begin());
    for (int64_t p = 0; p < pairs; ++p) outgoing[s.next[s.place_of[p]]++] = static_cast<int32_t>(p);
    if (pairs == 0) std::iota(outgoing, outgoing + tokens * top_k, 0);

    // Rows from each rank for each own slot.
    const int64_t held = static_cast<int64_t>(own.size());
    s.from.assign(size * held, 0);
    int32_t* offsets = context.output<int32_t>(2, {held + 1});
    offsets[0] = 0;
    for (int64_t i = 0; i < held; ++i) {
      const auto [expert, number] = copy_of(table, experts, width, own[i]);
      int32_t arrived = 0;
      for (int q = 0; q < size; ++q) {
        const int32_t before = taken(arrived, number, s.copies[expert]);
        arrived += s.counted_everywhere[q * experts + expert];
        if (own[i] >= computed) continue;
        s.from[q * held + i] = taken(arrived, number, s.copies[expert]) - before;
        received[q] += s.from[q * held + i];
      }
      offsets[i + 1] = offsets[i] + taken(arrived, number, s.copies[expert]);
    }
    const int64_t arriving = std::accumulate(received, received + size, int64_t{0});
    int32_t* rows = context.output<int32_t>(1, {arriving});
    s.next.assign(offsets, offsets + held + 1);
    int32_t row = 0;
    for (int q = 0; q < size; ++q) {
      for (int64_t i = 0; i < held; ++i) {
        for (int32_t n = 0; n < s.from[q * held + i]; ++n) rows[s.next[i]++] = row++;
      }
    }

    float* arrived = context.output<float>(0, {arriving, columns});
    s.rows.resize(std::max<size_t>(s.rows.size(), pairs * columns));
    float *leaving = s.rows.data(), *stays = arrived;
    for (int q = 0; q < me; ++q) stays += received[q] * columns;
    const float* data = x.as<float>();
    int64_t i = 0;
    for (int q = 0; q < size; ++q) {
      for (int32_t n = 0; n < sent[q]; ++n, ++i) {
        copy_row(data + outgoing[i] / top_k * columns, columns, q == me ? stays + n * columns : leaving + i * columns);
      }
    }
    ranks.exchange(leaving, sent, arrived, received, columns);
  }

  void count_copies(const int32_t* table, int64_t experts, int64_t width, Counts& copies) const {
    copies.assign(experts, 0);
    for (int64_t e = 0; e < experts; ++e) {
      const int32_t* row = table + e * width;
      while (copies[e] < width && row[copies[e]] != -1) {
        const int32_t slot = row[copies[e]++];
        require(slot >= 0 && slot < slots, "replicas[", e, "] names slot ", slot, ", outside 0..", slots - 1);
      }
    }
  }

  // The expert of a slot, and the slot's number among the expert's copies.
  static std::pair<int64_t, int32_t> copy_of(const int32_t* table, int64_t experts, int64_t width, int32_t slot) {
    const int64_t at = std::find(table, table + experts * width, slot) - table;
    require(at < experts * width, "slot ", slot, " is not in replicas");
    return {at / width, static_cast<int32_t>(at % width)};
  }
};

struct ExchangeReturn {
  static constexpr const char* kName = "ExchangeReturn";
  static constexpr int kInputs[] = {kFloat, kInt32, kInt32, kInt32};
  static constexpr int kOutputs[] = {kFloat};
  static constexpr size_t kOptionalInputs = 0;

  Ranks& ranks;

  explicit ExchangeReturn(const Info&) : ranks(Ranks::all()) {}

  // y [N, H] is in the order of slots, and `rows` says where each of its rows arrived. Returns the rows of this rank's pairs in
  // the order in which they left, [T * k, H]; zeros for pairs that stayed.
  void compute(Context& context) const {
    const std::lock_guard<std::mutex> turn(ranks.turn());
    const Tensor y = context.required(0, "y", 2), rows = context.required(1, "rows", 1);
    const Tensor outgoing = context.required(2, "outgoing", 1), exchanged = context.required(3, "exchanged", 2);
    const int size = ranks.size(), me = ranks.rank();
    const int64_t arrived = y.dim(0), columns = y.dim(1), pairs = outgoing.dim(0);
    require(rows.dim(0) == arrived, "rows has ", rows.dim(0), " entries, y ", arrived, " rows");
    require(exchanged.dim(0) == 2 && exchanged.dim(1) == size, "exchanged must be [2, ", size, "]");
    const int32_t *sent = exchanged.as<int32_t>(), *received = sent + size;
    require(std::accumulate(received, received + size, int64_t{0}) == arrived, "exchanged counts other rows than y has");
    const int64_t left = std::accumulate(sent, sent + size, int64_t{0});
    require(left <= pairs, "exchanged counts ", left, " rows that left, outgoing ", pairs);

    float* back = context.output<float>(0, {pairs, columns});
    std::fill_n(back + left * columns, (pairs - left) * columns, 0.0f);
    std::vector<float>& shared = scratch().rows;
    shared.resize(std::max<size_t>(shared.size(), arrived * columns));
    const int64_t first = std::accumulate(received, received + me, int64_t{0}), last = first + received[me];
    float* stays = back + std::accumulate(sent, sent + me, int64_t{0}) * columns;
    for (int64_t i = 0; i < arrived; ++i) {
      const int32_t row = rows.as<int32_t>()[i];
      require(row >= 0 && row < arrived, "rows[", i, "] is ", row, ", outside 0..", arrived - 1);
      const bool own = row >= first && row < last;
      copy_row(y.as<float>() + i * columns, columns, own ? stays + (row - first) * columns : shared.data() + row * columns);
    }
    ranks.exchange(shared.data(), received, back, sent, columns);
  }
};

}  // namespace

OrtCustomOp* exchange_dispatch_op() { return custom_op<ExchangeDispatch>(); }
OrtCustomOp* exchange_return_op() { return custom_op<ExchangeReturn>(); }

}  // namespace rq
