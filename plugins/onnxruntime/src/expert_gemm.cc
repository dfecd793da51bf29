// ExpertGemm multiplies the rows of x of every slot by the slot's weights, and applies bias and activation. DenseGemm multiplies
// all rows by one matrix, or by several.
//
// The work of all slots is cut into tiles. A tile is some panels of one slot times up to kTileRows of its rows. No two tiles
// write the same outputs. README.md has a drawing.
#include <algorithm>
#include <cstring>
#include <thread>

#include "arena.h"
#include "weights.h"

namespace rq {
namespace {

constexpr int64_t kTileRows = 64;                          // rows of x that share a pass over a panel
constexpr int64_t kTilesOfAThread = 16, kMostTiles = 256;  // fewer if there are fewer panels
constexpr int64_t kWorthATile = 1 << 16;                   // multiplications, which take as long as waking a thread
constexpr int64_t kRoundedAtOnce = 16384;                  // numbers of x that are worth another thread
constexpr int64_t kApart = 16;  // floats between rounded rows, which would otherwise often start in the same set of a cache

// Enough tiles that no core waits long for the last one, but not more: each tile has a fixed cost of about 0.2 microseconds.
int64_t tiles_wanted(int64_t multiplications) {
  static const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
  return std::clamp(multiplications / kWorthATile, int64_t{1}, std::min(kMostTiles, threads * kTilesOfAThread));
}

// The columns of y of one matrix: `count` of them, from panel `first_panel` on.
struct Columns {
  int64_t first_panel, count;
};

std::vector<Columns> columns_of(const std::vector<int64_t>& widths) {
  std::vector<Columns> columns;
  int64_t panels = 0;
  for (int64_t width : widths) {
    require(width > 0, "attribute outputs is ", width, ", not a positive number of columns");
    columns.push_back({panels, width});
    panels += (width + kPanel - 1) / kPanel;
  }
  require(!columns.empty(), "attribute outputs is empty");
  return columns;
}

Activation activation_named(const std::string& name) {
  static constexpr std::pair<const char*, Activation> kNames[] = {
      {"none", Activation::none},   {"swiglu", Activation::swiglu},
      {"geglu", Activation::geglu}, {"geglu_tanh", Activation::geglu_tanh},
      {"relu", Activation::relu},   {"clamped_swiglu", Activation::clamped_swiglu},
      {"gelu", Activation::gelu},   {"limited_swiglu", Activation::limited_swiglu},
      {"relu2", Activation::relu2},
  };
  for (const auto& [known, value] : kNames) {
    if (name == known) return value;
  }
  throw Error("unknown activation '" + name + "'");
}

bool gated(Activation activation) {
  return activation == Activation::swiglu || activation == Activation::geglu || activation == Activation::geglu_tanh ||
         activation == Activation::clamped_swiglu || activation == Activation::limited_swiglu;
}

struct ExpertGemm {
  static constexpr const char* kName = "ExpertGemm";
  static constexpr int kInputs[] = {kFloat, kInt32, kInt32};
  static constexpr int kOutputs[] = {kFloat};
  static constexpr size_t kOptionalInputs = most_operands();

  SlotWeights weights;
  Activation activation;
  float alpha, limit;
  bool gather, rounds;
  std::vector<Columns> columns_of_y;
  int64_t outputs, parts, groups;  // columns of y; panels for 16 of them (2 with a gate); sets of 16 columns
  const Kernels& kernels;

  explicit ExpertGemm(const Info& info) : ExpertGemm(info, {info.integer("outputs")}) {}

  // `widths`: columns of y of each matrix of a slot. Only a DenseGemm has several.
  ExpertGemm(const Info& info, const std::vector<int64_t>& widths)
      : weights(info.integers("formats"), info.integers("weights")),
        activation(activation_named(info.text("activation", "none"))),
        alpha(info.real("alpha", 1.702f)),
        limit(info.real("limit", 7.0f)),
        gather(info.integer("gather", 0) != 0),
        columns_of_y(columns_of(widths)),
        outputs(widths.front()),
        parts(gated(activation) ? 2 : 1),
        groups(columns_of_y.back().first_panel + (columns_of_y.back().count + kPanel - 1) / kPanel),
        kernels(best_kernels()) {
    const int64_t bits = info.integer("activation_bits", 32);
    require(bits == 8 || bits == 32, "attribute activation_bits is ", bits, ", not 8 or 32");
    rounds = bits == 8;
  }

  // The form in which rows of x are multiplied by a slot's weights.
  enum Form : uint8_t { floats = 0, bfloats = 1, quantized = 2 };

  Form form_of(const SlotWeights::Bound& bound, int64_t slot) const {
    if (!rounds) return floats;
    if (weights.takes_int8(slot)) return quantized;
    return weights.of(bound, slot).storage == Storage::bf16 ? bfloats : floats;
  }

  // The data that all tiles of one call share. Row i of x in slot order is rows[i] or, for a quantized slot, records[i].
  struct Call {
    SlotWeights::Bound bound;
    const int32_t* offsets;
    const float* bias;
    const float* const* rows;
    const uint8_t* const* records;
    QuantizedLayout layout;
    const int64_t* first_tile;  // of each slot; the last entry is the number of tiles
    int64_t groups_at_once;
    float* const* out;  // for each matrix
  };

  void compute(Context& context) const {
    const Tensor x = context.required(0, "x", 2), rows = context.required(1, "rows", 1),
                 offsets = context.required(2, "offsets", 1);
    const int64_t pairs = rows.dim(0);
    check_offsets(offsets, weights.slots(), pairs);
    const int64_t top_k = pairs_of_a_row(x, pairs);
    float* out = context.output<float>(0, {pairs, outputs});
    multiply(context, {x.as<float>(), x.dim(0), x.dim(1)}, offsets.as<int32_t>(), 3, &out, [&](int64_t i) {
      const int32_t pair = rows.as<int32_t>()[i];
      require(pair >= 0 && pair < pairs, "rows[", i, "] is ", pair, ", outside 0..", pairs - 1);
      return gather ? pair / top_k : i;
    });
  }

  struct Rows {
    const float* x;
    int64_t count, columns;
  };

  // Row i in slot order is row `row_of(i)` of x. The input `first_weights` is the first that holds weights.
  template <typename RowOf>
  void multiply(const Context& context, const Rows& x, const int32_t* offset, size_t first_weights, float* const* out,
                RowOf row_of) const {
    const int64_t slots = weights.slots(), pairs = offset[slots], columns = x.columns;
    require(columns > 0, "x has no columns");
    const SlotWeights::Bound bound = weights.bind(context, first_weights, groups * parts, columns);
    const Tensor& bias = bound.bias;
    require(!bias.present || columns_of_y.size() == 1, "several matrices take no bias");
    require(!bias.present || (bias.dim(0) == slots && bias.dim(1) == outputs * parts), "bias must be [", slots, ", ",
            outputs * parts, "]");

    const QuantizedLayout layout = layout_of(bound, columns);
    const bool has_bfloats = rounds && bound.holds(Storage::bf16);
    Arena arena;
    const auto rows = arena.reserve<const float*>(pairs);
    const auto records = arena.reserve<const uint8_t*>(pairs);
    const auto first_tile = arena.reserve<int64_t>(slots + 1);
    const auto needed = arena.reserve<uint8_t>(x.count);
    const auto as_bfloats = arena.reserve<float>(has_bfloats ? x.count * (columns + kApart) : 0);
    const auto as_records = arena.reserve<uint8_t>(x.count * layout.row_bytes);
    arena.allocate();

    std::memset(needed.data(), 0, static_cast<size_t>(x.count));
    for (int64_t s = 0; s < slots; ++s) {
      const Form form = form_of(bound, s);
      for (int64_t i = offset[s]; i < offset[s + 1]; ++i) {
        const int64_t row = row_of(i);
        rows.data()[i] = form == bfloats ? as_bfloats.data() + row * (columns + kApart) : x.x + row * columns;
        records.data()[i] = as_records.data() + row * layout.row_bytes;
        needed.data()[row] |= form;
      }
    }
    if (has_bfloats || layout.blocks) round_rows(context, x, needed.data(), as_bfloats.data(), layout, as_records.data());

    const int64_t groups_at_once = cut(offset, slots, columns, first_tile.data());
    const Call call{
        bound,          offset, bias.present ? bias.as<float>() : nullptr, rows.data(), records.data(), layout, first_tile.data(),
        groups_at_once, out};
    auto work = [&](size_t index) { tile(call, static_cast<int64_t>(index)); };
    context.parallel(static_cast<size_t>(first_tile.data()[slots]), work);
  }

  // Sets the first tile of each slot, and returns how many sets of 16 outputs a tile has.
  int64_t cut(const int32_t* offset, int64_t slots, int64_t columns, int64_t* first_tile) const {
    int64_t strips = 0;  // each of up to kTileRows rows
    for (int64_t s = 0; s < slots; ++s) strips += (offset[s + 1] - offset[s] + kTileRows - 1) / kTileRows;
    const int64_t wanted = tiles_wanted(offset[slots] * groups * parts * kPanel * columns), beside = kSideBySide / parts;
    const int64_t at_once = wanted == 1 ? groups : std::max<int64_t>(1, strips * groups / wanted / beside) * beside;
    int64_t tiles = 0;
    for (int64_t s = 0; s < slots; ++s) {
      first_tile[s] = tiles;
      tiles += (offset[s + 1] - offset[s] + kTileRows - 1) / kTileRows * ((groups + at_once - 1) / at_once);
    }
    first_tile[slots] = tiles;
    return at_once;
  }

  void tile(const Call& call, int64_t index) const {
    const int64_t slot = std::upper_bound(call.first_tile, call.first_tile + weights.slots(), index) - call.first_tile - 1;
    const int64_t first_row = call.offsets[slot], rows_here = call.offsets[slot + 1] - first_row;
    const int64_t strips = (rows_here + kTileRows - 1) / kTileRows, place = index - call.first_tile[slot];
    const int64_t begin = first_row + place % strips * kTileRows, rows = std::min(kTileRows, first_row + rows_here - begin);
    const int64_t first = place / strips * call.groups_at_once, last = std::min(groups, first + call.groups_at_once);
    const Matrix matrix = weights.of(call.bound, slot);
    const Form form = form_of(call.bound, slot);
    const auto multiply_floats = form == bfloats ? kernels.multiply_bfloats : kernels.multiply_floats;
    const float* bias = call.bias ? call.bias + slot * outputs * parts : nullptr;
    alignas(64) float products[kSideBySide * kTileRows * kPanel];
    const int64_t at_once = kTileRows / rows * kSideBySide;  // panels: with fewer rows, more in one stretch
    for (int64_t panel = first * parts; panel < last * parts; panel += at_once) {
      const int64_t panels = std::min(at_once, last * parts - panel);
      if (form == quantized) {
        kernels.multiply_quantized(call.records + begin, rows, call.layout, matrix, panel, panels, products);
      } else {
        multiply_floats(call.rows + begin, rows, matrix, panel, panels, products);
      }
      for (int64_t p = 0; p < panels; p += parts) {
        finish((panel + p) / parts, bias, rows, products + p * rows * kPanel, call.out, begin);
      }
    }
  }

  // Applies bias and activation to 16 outputs of the rows from `begin` on. Their products are stored panel by panel.
  void finish(int64_t group, const float* bias, int64_t rows, float* products, float* const* out, int64_t begin) const {
    size_t matrix = 0;
    while (matrix + 1 < columns_of_y.size() && columns_of_y[matrix + 1].first_panel <= group) ++matrix;
    const auto [first_panel, width] = columns_of_y[matrix];
    const int64_t first = (group - first_panel) * kPanel, count = std::min(kPanel, width - first), size = rows * kPanel;
    float* y = out[matrix] + begin * width + first;
    for (int64_t p = 0; bias && p < parts; ++p) add_bias(bias + p * outputs + group * kPanel, count, rows, products + p * size);
    kernels.activate(activation, alpha, limit, products + size, products, size);
    for (int64_t i = 0; i < rows; ++i) std::copy_n(products + i * kPanel, count, y + i * width);
  }

  static void add_bias(const float* bias, int64_t count, int64_t rows, float* products) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < count; ++j) products[i * kPanel + j] += bias[j];
    }
  }

  QuantizedLayout layout_of(const SlotWeights::Bound& bound, int64_t columns) const {
    if (!rounds || !bound.block) return quantized_layout(0, 0);
    return quantized_layout(bound.block, (columns + bound.block - 1) / bound.block);
  }

  // Rounds every row to the forms in which it is needed.
  void round_rows(const Context& context, const Rows& x, const uint8_t* needed, float* as_bfloats, const QuantizedLayout& layout,
                  uint8_t* records) const {
    const int64_t rows = x.count, columns = x.columns, at_once = std::max<int64_t>(1, kRoundedAtOnce / columns);
    auto work = [&](size_t index) {
      const int64_t begin = static_cast<int64_t>(index) * at_once, end = std::min(rows, begin + at_once);
      for (int64_t i = begin; i < end; ++i) {
        const float* row = x.x + i * columns;
        if (needed[i] & bfloats) kernels.round_to_bfloat(row, columns, as_bfloats + i * (columns + kApart));
        if (needed[i] & quantized) kernels.quantize(row, columns, layout, records + i * layout.row_bytes);
      }
    };
    context.parallel(static_cast<size_t>((rows + at_once - 1) / at_once), work);
  }

  int64_t pairs_of_a_row(const Tensor& x, int64_t pairs) const {
    const int64_t tokens = x.dim(0);
    require(gather ? (tokens == 0 ? pairs == 0 : pairs % tokens == 0) : pairs == tokens, "x has ", tokens, " rows for ", pairs,
            " pairs");
    return gather && tokens ? pairs / tokens : 1;
  }

  // Slots without weights, those of constant experts, come after the others. Their rows are not written.
  static void check_offsets(const Tensor& offsets, int64_t slots, int64_t pairs) {
    const int64_t all = offsets.dim(0) - 1;
    require(all >= slots, "offsets has ", all + 1, " entries for ", slots, " slots");
    const int32_t* offset = offsets.as<int32_t>();
    require(offset[0] == 0 && (all > slots ? offset[slots] <= pairs : offset[slots] == pairs), "offsets run from ", offset[0],
            " to ", offset[slots], ", not 0 to ", pairs);
    for (int64_t s = 0; s < slots; ++s) require(offset[s] <= offset[s + 1], "offsets fall at slot ", s);
  }
};

// An ExpertGemm with one slot, to which all rows of x belong. x may have any rank. Of several matrices, one after the other in
// the panels of the slot, each has an output of its own.
struct DenseGemm : ExpertGemm {
  static constexpr const char* kName = "DenseGemm";
  static constexpr int kInputs[] = {kFloat};
  static constexpr bool kMoreOutputs = true;

  explicit DenseGemm(const Info& info) : ExpertGemm(info, widths_of(info)) {
    require(weights.slots() == 1, "attribute formats has ", weights.slots(), " entries, not the one of a dense matrix");
    require(columns_of_y.size() == 1 || activation == Activation::none, "several matrices take no activation");
  }

  void compute(Context& context) const {
    const Tensor x = context.required(0, "x");
    require(x.rank > 0, "x is a scalar");
    int64_t shape[Tensor::kMaxRank], rows = 1;
    for (size_t axis = 0; axis + 1 < x.rank; ++axis) rows *= shape[axis] = x.dim(axis);
    require(rows <= INT32_MAX, "x has ", rows, " rows, more than ", INT32_MAX);
    std::vector<float*> out;
    for (size_t matrix = 0; matrix < columns_of_y.size(); ++matrix) {
      shape[x.rank - 1] = columns_of_y[matrix].count;
      out.push_back(context.output<float>(matrix, shape, x.rank));
    }
    const int32_t offsets[] = {0, static_cast<int32_t>(rows)};
    multiply(context, {x.as<float>(), rows, x.dim(x.rank - 1)}, offsets, 1, out.data(), [](int64_t i) { return i; });
  }

 private:
  // Nodes before version 6 of the op set have one number.
  static std::vector<int64_t> widths_of(const Info& info) {
    const std::vector<int64_t> widths = info.integers("outputs");
    return widths.empty() ? std::vector<int64_t>{info.integer("outputs")} : widths;
  }
};

}  // namespace

OrtCustomOp* expert_gemm_op() { return custom_op<ExpertGemm>(); }
OrtCustomOp* dense_gemm_op() { return custom_op<DenseGemm>(); }

}  // namespace rq
