// Combine: y[t] = sum over the choices c of gates[t, c] * (slot output of pair (t, c)), added in the order of the choices.
#include <algorithm>

#include "kernels.h"
#include "op.h"

namespace rq {
namespace {

struct Combine {
  static constexpr const char* kName = "Combine";
  static constexpr int kInputs[] = {kFloat, kInt32, kFloat};
  static constexpr int kOutputs[] = {kFloat};
  static constexpr size_t kOptionalInputs = 0;

  const Kernels& kernels;

  explicit Combine(const Info&) : kernels(best_kernels()) {}

  void compute(Context& context) const {
    const Tensor y = context.required(0, "y", 2), rows = context.required(1, "rows", 1), gates = context.required(2, "gates", 2);
    const int64_t pairs = y.dim(0), hidden = y.dim(1), tokens = gates.dim(0), top_k = gates.dim(1);
    require(pairs == tokens * top_k, "y has ", pairs, " rows, gates ask for ", tokens, " x ", top_k);
    require(rows.dim(0) == pairs, "rows has ", rows.dim(0), " entries, y ", pairs, " rows");

    std::vector<const float*> row_of(pairs, nullptr);
    for (int64_t i = 0; i < pairs; ++i) {
      const int32_t pair = rows.as<int32_t>()[i];
      require(pair >= 0 && pair < pairs && !row_of[pair], "rows is not a permutation: ", pair, " at ", i);
      row_of[pair] = y.as<float>() + i * hidden;
    }
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
};

}  // namespace

OrtCustomOp* combine_op() { return custom_op<Combine>(); }

}  // namespace rq
