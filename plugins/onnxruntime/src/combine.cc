// Combine: y[t] = sum over the choices c of gates[t, c] * (output of pair (t, c)), added in the order of the choices.
//
// The output of a pair is the row of y that `rows` assigns to it. For a pair of a constant expert, it is a row of `outputs`. Such
// pairs come last in `rows`, and y need not have rows for them.
#include <algorithm>

#include "kernels.h"
#include "op.h"

namespace rq {
namespace {

struct Combine {
  static constexpr const char* kName = "Combine";
  static constexpr int kInputs[] = {kFloat, kInt32, kFloat};
  static constexpr int kOutputs[] = {kFloat};
  static constexpr size_t kOptionalInputs = 3;  // ids [T, k]; places [E], of each expert in outputs, or -1; outputs [C, H]

  const Kernels& kernels;

  explicit Combine(const Info&) : kernels(best_kernels()) {}

  void compute(Context& context) const {
    const Tensor y = context.required(0, "y", 2), rows = context.required(1, "rows", 1), gates = context.required(2, "gates", 2);
    const Tensor outputs = context.input(5, "outputs", 2);
    const int64_t held = y.dim(0), hidden = y.dim(1), tokens = gates.dim(0), top_k = gates.dim(1), pairs = tokens * top_k;
    require(outputs.present ? held <= pairs : held == pairs, "y has ", held, " rows, gates ask for ", tokens, " x ", top_k);
    require(rows.dim(0) == pairs, "rows has ", rows.dim(0), " entries for ", pairs, " pairs");

    std::vector<const float*> row_of(pairs, nullptr);
    for (int64_t i = 0; i < held; ++i) {
      const int32_t pair = rows.as<int32_t>()[i];
      require(pair >= 0 && pair < pairs && !row_of[pair], "rows is not a permutation: ", pair, " at ", i);
      row_of[pair] = y.as<float>() + i * hidden;
    }
    if (outputs.present) take(context, outputs, hidden, row_of);
    float* out = context.output<float>(0, {tokens, hidden});
    constexpr int64_t kTokensPerTile = 8;
    auto tile = [&](size_t index) {
      const int64_t first = static_cast<int64_t>(index) * kTokensPerTile, last = std::min(first + kTokensPerTile, tokens);
      for (int64_t t = first; t < last; ++t) {
        kernels.combine(row_of.data() + t * top_k, gates.as<float>() + t * top_k, top_k, hidden, out + t * hidden);
      }
    };
    context.parallel((tokens + kTokensPerTile - 1) / kTokensPerTile, tile);
  }

  // Sets the output of each pair of a constant expert.
  static void take(const Context& context, const Tensor& outputs, int64_t hidden, std::vector<const float*>& row_of) {
    const Tensor ids = context.required(3, "ids", 2), places = context.required(4, "places", 1);
    const int64_t pairs = static_cast<int64_t>(row_of.size()), experts = places.dim(0), constants = outputs.dim(0);
    require(ids.type == kInt64 && places.type == kInt32 && outputs.type == kFloat, "ids, places and outputs have other types");
    require(ids.dim(0) * ids.dim(1) == pairs, "ids has ", ids.dim(0), " x ", ids.dim(1), " entries for ", pairs, " pairs");
    require(outputs.dim(1) == hidden, "outputs has ", outputs.dim(1), " columns, y ", hidden);
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t id = ids.as<int64_t>()[p];
      require(id >= 0 && id < experts, "expert id ", id, " is outside 0..", experts - 1);
      const int32_t place = places.as<int32_t>()[id];
      require(place < constants, "places[", id, "] is ", place, ", but outputs has ", constants, " rows");
      if (place >= 0) row_of[p] = outputs.as<float>() + place * hidden;
      require(row_of[p], "pair ", p, " has no output");
    }
  }
};

}  // namespace

OrtCustomOp* combine_op() { return custom_op<Combine>(); }

}  // namespace rq
