// CacheAttention: attention of new tokens to a cache of keys and values, which it extends by theirs. Here are its inputs and outputs;
// the computation is in attention_decode.cc and attention_prefill.cc. Queries and keys are first rotated by their positions, if
// the node has the cosines and sines.
#include <algorithm>
#include <cmath>
#include <limits>

#include "arena.h"
#include "attention.h"
#include "rotation.h"

namespace rq {
namespace {

struct CacheAttention {
  static constexpr const char* kName = "CacheAttention";
  static constexpr int kInputs[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kBool};
  static constexpr int kOutputs[] = {kFloat, kFloat, kFloat};
  static constexpr size_t kOptionalInputs = 3;  // sinks, cos, sin

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
    Tensor query = context.required(0, "query", 3), key = context.required(1, "key", 3);
    const Tensor value = context.required(2, "value", 3), past_key = context.required(3, "past_key", 4),
                 past_value = context.required(4, "past_value", 4), mask = context.required(5, "mask", 4),
                 sinks = context.input(6, "sinks", 1), cos = context.input(7, "cos", 2), sin = context.input(8, "sin", 2);
    const int64_t width = width_of("query", query, heads), value_width = width_of("value", value, kv_heads);
    require(width_of("key", key, kv_heads) == width, "query has ", width, " numbers for each head, key ", key.dim(2) / kv_heads);
    const Sizes size = sizes_of(heads, kv_heads, query, past_key, "past_key", mask);
    require_same_tokens("key", key, size), require_same_tokens("value", value, size);
    require_cache("past_key", past_key, size, width), require_cache("past_value", past_value, size, value_width);
    require_sinks(sinks, heads);
    float* y = context.output<float>(0, {size.sequences, size.steps, heads * value_width});
    float* present_key = context.output<float>(1, {size.sequences, kv_heads, size.length, width});
    float* present_value = context.output<float>(2, {size.sequences, kv_heads, size.length, value_width});
    const Mask rows(mask);
    Arena arena;
    if (cos.present || sin.present) rotate(context, size, width, cos, sin, query, key, arena);
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
    if (size.steps == 1) decode(attention, context);
    else prefill(attention, context);
  }

 private:
  // Lets `query` and `key` be rotated copies in `arena`.
  void rotate(const Context& context, const Sizes& size, int64_t width, const Tensor& cos, const Tensor& sin, Tensor& query,
              Tensor& key, Arena& arena) const {
    constexpr int64_t kWorthATask = 65536;  // numbers
    const int64_t tokens = size.sequences * size.steps;
    require_angles("cos", cos, tokens, width), require_angles("sin", sin, tokens, width);
    const auto queries = arena.reserve<float>(tokens * heads * width), keys = arena.reserve<float>(tokens * kv_heads * width);
    arena.allocate();
    const Rotation rotation{cos.as<float>(), sin.as<float>(), width / 2};
    const int64_t of_task = std::max<int64_t>(1, kWorthATask / ((heads + kv_heads) * width));
    auto task = [&](size_t index) {
      const int64_t first = static_cast<int64_t>(index) * of_task;
      for (int64_t token = first; token < std::min(first + of_task, tokens); ++token) {
        const int64_t of_query = token * heads * width, of_key = token * kv_heads * width;
        rotation(token, heads, query.as<float>() + of_query, queries.data() + of_query);
        rotation(token, kv_heads, key.as<float>() + of_key, keys.data() + of_key);
      }
    };
    context.parallel(static_cast<size_t>((tokens + of_task - 1) / of_task), task);
    query.data = queries.data(), key.data = keys.data();
  }

  static int64_t width_of(const char* name, const Tensor& tensor, int64_t heads) {
    require(tensor.dim(2) > 0 && tensor.dim(2) % heads == 0, name, " has ", tensor.dim(2), " columns, which do not divide into ",
            heads, " heads");
    return tensor.dim(2) / heads;
  }
};

}  // namespace

OrtCustomOp* cache_attention_op() { return custom_op<CacheAttention>(); }

}  // namespace rq
