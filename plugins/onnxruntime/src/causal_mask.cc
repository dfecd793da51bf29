// CausalMask: the columns of the cache that new tokens may read, as booleans for the attention ops.
#include <algorithm>
#include <cstring>
#include <vector>

#include "op.h"

namespace rq {
namespace {

struct CausalMask {
  static constexpr const char* kName = "CausalMask";
  static constexpr int kInputs[] = {kInt64, kInt64};
  static constexpr int kOutputs[] = {kBool};
  static constexpr size_t kOptionalInputs = 0;
  static constexpr int64_t kBytesPerTile = 1 << 16;

  int64_t window;  // the last columns that a token reads, its own included; -1: all

  explicit CausalMask(const Info& info) : window(info.integer("local_window_size", -1)) {
    require(window == -1 || window > 0, "attribute local_window_size is ", window, ", neither positive nor -1");
  }

  void compute(Context& context) const {
    const Tensor mask = context.required(0, "attention_mask", 2), tokens = context.required(1, "input_ids", 2);
    const int64_t sequences = tokens.dim(0), steps = tokens.dim(1), total = mask.dim(1);
    require(mask.dim(0) == sequences, "attention_mask has ", mask.dim(0), " sequences, input_ids ", sequences);
    require(steps <= total, "attention_mask has ", total, " columns, fewer than the ", steps, " tokens of input_ids");
    uint8_t* out = reinterpret_cast<uint8_t*>(context.output<bool>(0, {sequences, 1, steps, total}));
    std::vector<uint8_t> read(static_cast<size_t>(sequences * total));
    for (size_t i = 0; i < read.size(); ++i) read[i] = mask.as<int64_t>()[i] != 0;
    const int64_t rows = sequences * steps, of_tile = std::max<int64_t>(1, kBytesPerTile / std::max<int64_t>(1, total));
    auto tile = [&](size_t index) {
      const int64_t first = static_cast<int64_t>(index) * of_tile;
      for (int64_t i = first; i < std::min(first + of_tile, rows); ++i) {
        const int64_t end = total - steps + i % steps + 1, begin = window == -1 ? 0 : std::max<int64_t>(0, end - window);
        uint8_t* row = out + i * total;
        std::memset(row, 0, static_cast<size_t>(total));
        std::memcpy(row + begin, read.data() + i / steps * total + begin, static_cast<size_t>(end - begin));
      }
    };
    context.parallel(static_cast<size_t>((rows + of_tile - 1) / of_tile), tile);
  }
};

}  // namespace

OrtCustomOp* causal_mask_op() { return custom_op<CausalMask>(); }

}  // namespace rq
