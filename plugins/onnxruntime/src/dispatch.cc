// Dispatch groups the (token, choice) pairs by slot, with a counting sort.
#include "op.h"

namespace rq {
namespace {

struct Dispatch {
  static constexpr const char* kName = "Dispatch";
  static constexpr int kInputs[] = {kInt64, kInt32};
  static constexpr int kOutputs[] = {kInt32, kInt32};
  static constexpr size_t kOptionalInputs = 0;

  int64_t slots;

  explicit Dispatch(const Info& info) : slots(info.integer("slots")) {
    require(slots > 0 && slots < INT32_MAX, "attribute slots is ", slots, ", not a positive number of slots");
  }

  void compute(Context& context) const {
    const Tensor ids = context.required(0, "ids", 2);
    const Tensor replicas = context.required(1, "replicas", 2);
    const int64_t pairs = ids.dim(0) * ids.dim(1), experts = replicas.dim(0), width = replicas.dim(1);
    require(pairs < INT32_MAX, pairs, " (token, choice) pairs do not fit int32; use a smaller batch");
    const int64_t* id = ids.as<int64_t>();
    const int32_t* table = replicas.as<int32_t>();

    std::vector<int32_t> copies(experts);
    for (int64_t e = 0; e < experts; ++e) {
      const int32_t* row = table + e * width;
      while (copies[e] < width && row[copies[e]] != -1) {
        const int32_t slot = row[copies[e]++];
        require(slot >= 0 && slot < slots, "replicas[", e, "] names slot ", slot, ", outside 0..", slots - 1);
      }
    }
    int32_t* rows = context.output<int32_t>(0, {pairs});
    int32_t* offsets = context.output<int32_t>(1, {slots + 1});

    std::vector<int32_t> arrivals(experts), slot_of(pairs), next(slots + 1);
    for (int64_t p = 0; p < pairs; ++p) {
      require(id[p] >= 0 && id[p] < experts, "expert id ", id[p], " is outside 0..", experts - 1);
      require(copies[id[p]] > 0, "expert ", id[p], " has no slot in replicas");
      slot_of[p] = table[id[p] * width + arrivals[id[p]]++ % copies[id[p]]];
      ++next[slot_of[p] + 1];
    }
    for (int64_t s = 0; s < slots; ++s) next[s + 1] += next[s];
    for (int64_t s = 0; s <= slots; ++s) offsets[s] = next[s];
    for (int64_t p = 0; p < pairs; ++p) rows[next[slot_of[p]]++] = static_cast<int32_t>(p);
  }
};

}  // namespace

OrtCustomOp* dispatch_op() { return custom_op<Dispatch>(); }

}  // namespace rq
