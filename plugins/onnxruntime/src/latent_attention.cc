// LatentAttention: attention whose keys and values are products of one cached latent for each token. Here are its inputs and outputs,
// and the choice of its form; the computation is in attention_absorbed.cc and attention_expanded.cc.
#include <cmath>
#include <limits>

#include "latent.h"
#include "weights.h"

namespace rq {
namespace {

struct LatentAttention {
  static constexpr const char* kName = "LatentAttention";
  static constexpr int kInputs[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kBool};
  static constexpr int kOutputs[] = {kFloat, kFloat, kFloat};
  static constexpr size_t kOptionalInputs = 1 + most_operands();  // sinks and the weights
  static constexpr size_t kWeights = 7;                           // the first input that holds them

  int64_t heads, nope, value;
  float scale;
  SlotWeights weights;
  const Kernels& kernels;

  explicit LatentAttention(const Info& info)
      : heads(info.integer("num_heads")),
        nope(info.integer("qk_nope_head_dim")),
        value(info.integer("v_head_dim")),
        scale(info.real("scale", std::numeric_limits<float>::quiet_NaN())),
        weights(info.integers("formats"), {}),
        kernels(best_kernels()) {
    require(heads > 0 && nope > 0 && value > 0, "num_heads is ", heads, ", qk_nope_head_dim ", nope, " and v_head_dim ", value,
            "; all must be positive");
    require(weights.slots() == 1, "attribute formats has ", weights.slots(), " entries, not the one of kv_b");
    require(std::isfinite(scale), "attribute scale is missing or not finite");
  }

  void compute(Context& context) const {
    const Tensor query = context.required(0, "query", 3), latent = context.required(1, "latent", 3),
                 position = context.required(2, "position", 3), past_latent = context.required(3, "past_latent", 4),
                 past_position = context.required(4, "past_position", 4), mask = context.required(5, "mask", 4),
                 sinks = context.input(6, "sinks", 1);
    const Sizes size = sizes_of(heads, 1, query, past_latent, "past_latent", mask);
    const int64_t rank = latent.dim(2), rope = position.dim(2), rows = heads * (nope + value);
    require(rank > 0, "latent has no columns");
    require(query.dim(2) == heads * (nope + rope), "query has ", query.dim(2), " columns, not ", heads, " heads of ", nope, " + ",
            rope);
    require_same_tokens("latent", latent, size), require_same_tokens("position", position, size);
    require_cache("past_latent", past_latent, size, rank), require_cache("past_position", past_position, size, rope);
    require_sinks(sinks, heads);
    const SlotWeights::Bound bound = weights.bind(context, kWeights, (rows + kPanel - 1) / kPanel, rank);
    require(!bound.bias.present, "kv_b has no bias here");
    float* y = context.output<float>(0, {size.sequences, size.steps, heads * value});
    float* present_latent = context.output<float>(1, {size.sequences, 1, size.length, rank});
    float* present_position = context.output<float>(2, {size.sequences, 1, size.length, rope});
    const Mask read(mask);
    const Latent all{kernels,
                     size,
                     nope,
                     value,
                     scale,
                     query.as<float>(),
                     sinks.present ? sinks.as<float>() : nullptr,
                     read,
                     Cache("latent", size, past_latent, latent, present_latent, rank),
                     Cache("position", size, past_position, position, present_position, rope),
                     weights.of(bound, 0),
                     y};
    fill_all(context, size, {&all.latents, &all.positions});
    if (size.steps == 0) return;
    std::vector<int64_t> by_form[2];
    for (int64_t b = 0; b < size.sequences; ++b) by_form[expands(all, b)].push_back(b);
    absorbed(all, by_form[0], context);
    expanded(all, by_form[1], context);
  }

 private:
  // Whether fewer multiplications are needed with the keys and values of all columns, for one head.
  static bool expands(const Latent& all, int64_t sequence) {
    if (all.size.steps == 1) return false;
    const int64_t weights = all.rank() * (all.nope + all.value);
    int64_t queries = 0, pairs = 0;  // without padding among the new tokens
    for (int64_t s = 0; s < all.size.steps; ++s) {
      queries += !all.mask(sequence, s).empty();
      pairs += all.mask(sequence, s).columns.count();
    }
    const int64_t if_expanded = all.columns(sequence).count() * weights + pairs * (all.nope + all.rope() + all.value);
    return if_expanded < queries * weights + pairs * (2 * all.rank() + all.rope());
  }
};

}  // namespace

OrtCustomOp* latent_attention_op() { return custom_op<LatentAttention>(); }

}  // namespace rq
