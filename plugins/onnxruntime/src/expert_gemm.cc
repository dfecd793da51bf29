// ExpertGemm: for every slot, its rows of x times its weights, bias and activation fused.
//
// The work is cut into tiles, one slot x kTileColumns outputs each, over all slots at once: a tile is the same work
// whatever the number of threads. A tile of a slot with few rows reads the packed weights directly; with more it first
// unpacks its weight rows to fp32, which all its rows of x then share.
#include <algorithm>

#include "activation.h"
#include "kernels.h"
#include "op.h"

namespace rq {
namespace {

constexpr int64_t kTileColumns = 16;  // outputs of a tile
constexpr int64_t kRowsAtOnce = 48;   // rows of x between two passes of the activation
constexpr int64_t kDirectRows = 6;    // up to here, unpacking once per tile does not pay

struct Tile {
  int64_t slot, column;
};

struct ExpertGemm {
  static constexpr const char* kName = "ExpertGemm";
  static constexpr int kInputs[] = {kFloat, kInt32, kInt32, kUndefined, kUint8, kFloat, kUint8, kFloat, kFloat};
  static constexpr int kOutputs[] = {kFloat};
  static constexpr size_t kFirstOptional = 3;

  std::vector<int64_t> formats;
  Activation activation;
  float alpha, limit;
  bool gather;
  const Kernels& kernels;

  explicit ExpertGemm(const Info& info)
      : formats(info.integers("formats")),
        activation(activation_named(info.text("activation", "none"))),
        alpha(info.real("alpha", 1.702f)),
        limit(info.real("limit", 7.0f)),
        gather(info.integer("gather", 0) != 0),
        kernels(best_kernels()) {
    require(!formats.empty(), "attribute formats is empty");
    for (int64_t format : formats) require(format >= 0 && format <= 2, "attribute formats holds ", format, ", not 0, 1 or 2");
  }

  void compute(Context& context) const {
    const Tensor x = context.required(0, "x", 2), rows = context.required(1, "rows", 1), offsets = context.required(2, "offsets", 1);
    const int64_t slots = static_cast<int64_t>(formats.size()), pairs = rows.dim(0), inputs = x.dim(1);
    check_offsets(offsets, slots, pairs);

    int64_t width = -1;  // weight rows of a slot
    const std::vector<Matrix> weights = matrices(context, inputs, width);
    const bool halves = gated(activation);
    require(!halves || width % 2 == 0, "a gated activation needs an even number of weight rows, not ", width);
    const int64_t columns = halves ? width / 2 : width;
    const Tensor bias = context.input(8, "bias", 2);
    require(!bias.present || (bias.dim(0) == slots && bias.dim(1) == width), "bias must be [", slots, ", ", width, "]");
    const std::vector<const float*> sources = sources_of(x, rows);

    float* out = context.output<float>(0, {pairs, columns});
    const int32_t* offset = offsets.as<int32_t>();
    std::vector<Tile> tiles;
    for (int64_t s = 0; s < slots; ++s) {
      if (offset[s] == offset[s + 1]) continue;
      for (int64_t c = 0; c < columns; c += kTileColumns) tiles.push_back({s, c});
    }
    auto work = [&](size_t index) {
      const auto [slot, column] = tiles[index];
      const int64_t count = std::min(kTileColumns, columns - column), begin = offset[slot];
      const float* slot_bias = bias.present ? bias.as<float>() + slot * width : nullptr;
      tile(weights[slot], slot_bias, sources.data() + begin, offset[slot + 1] - begin, column, count, columns,
           out + begin * columns);
    };
    context.parallel(tiles.size(), work);
  }

  // Outputs [column, column + count) of one slot's `rows` rows.
  void tile(const Matrix& weights, const float* bias, const float* const* x, int64_t rows, int64_t column, int64_t count,
            int64_t columns, float* out) const {
    const int parts = gated(activation) ? 2 : 1;  // the up half of the rows begins at `columns`
    thread_local std::vector<float> unpacked;
    Matrix part[2] = {weights, weights};
    int64_t first[2] = {column, columns + column};
    if (rows > kDirectRows && weights.storage != Storage::fp32) {
      unpacked.resize(static_cast<size_t>(2 * kTileColumns * weights.columns));
      for (int p = 0; p < parts; ++p) {
        float* rows_here = unpacked.data() + p * kTileColumns * weights.columns;
        kernels.dequantize(weights, first[p], count, rows_here);
        part[p] = {Storage::fp32, reinterpret_cast<const uint8_t*>(rows_here),
                   static_cast<size_t>(weights.columns) * sizeof(float), nullptr, weights.columns, 0, 0};
      }
    }
    float products[2][kRowsAtOnce * kTileColumns];
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      const int64_t these = std::min(kRowsAtOnce, rows - r);
      for (int p = 0; p < parts; ++p) {
        const int64_t from = part[p].data == weights.data ? first[p] : 0;
        kernels.multiply(x + r, these, part[p], from, count, products[p], kTileColumns);
        if (!bias) continue;
        for (int64_t i = 0; i < these; ++i) {
          for (int64_t j = 0; j < count; ++j) products[p][i * kTileColumns + j] += bias[first[p] + j];
        }
      }
      for (int64_t i = 0; i < these; ++i) {
        activate(activation, alpha, limit, products[0] + i * kTileColumns, products[1] + i * kTileColumns,
                 out + (r + i) * columns + column, count);
      }
    }
  }

  static void check_offsets(const Tensor& offsets, int64_t slots, int64_t pairs) {
    require(offsets.dim(0) == slots + 1, "offsets has ", offsets.dim(0), " entries for ", slots, " slots");
    const int32_t* offset = offsets.as<int32_t>();
    require(offset[0] == 0 && offset[slots] == pairs, "offsets run from ", offset[0], " to ", offset[slots], ", not 0 to ", pairs);
    for (int64_t s = 0; s < slots; ++s) require(offset[s] <= offset[s + 1], "offsets fall at slot ", s);
  }

  // Where each of the rows, in slot order, is read from.
  std::vector<const float*> sources_of(const Tensor& x, const Tensor& rows) const {
    const int64_t pairs = rows.dim(0), tokens = x.dim(0);
    require(gather ? (tokens == 0 ? pairs == 0 : pairs % tokens == 0) : pairs == tokens, "x has ", tokens, " rows for ", pairs, " pairs");
    const int64_t top_k = gather && tokens ? pairs / tokens : 1;
    std::vector<const float*> sources(pairs);
    for (int64_t i = 0; i < pairs; ++i) {
      const int32_t pair = rows.as<int32_t>()[i];
      require(pair >= 0 && pair < pairs, "rows[", i, "] is ", pair, ", outside 0..", pairs - 1);
      sources[i] = x.as<float>() + (gather ? pair / top_k : i) * x.dim(1);
    }
    return sources;
  }

  // The weights of every slot; sets `width`, the number of weight rows, which all slots share.
  std::vector<Matrix> matrices(const Context& context, int64_t inputs, int64_t& width) const {
    static constexpr const char* kPacked[] = {"float_weights", "int8_packed", "int4_packed"};
    Tensor packed[3], scales[3];
    Matrix base[3] = {};
    for (int f = 0; f < 3; ++f) {
      const int64_t members = std::count(formats.begin(), formats.end(), f);
      if (!members) continue;
      packed[f] = context.required(f == 0 ? 3 : f == 1 ? 4 : 6, kPacked[f], 3);
      require(packed[f].dim(0) == members, kPacked[f], " holds ", packed[f].dim(0), " slots, formats says ", members);
      require(width < 0 || packed[f].dim(1) == width, kPacked[f], " has ", packed[f].dim(1), " rows, another format ", width);
      width = packed[f].dim(1);
      base[f] = f == 0 ? float_matrix(packed[f], inputs) : quantized_matrix(context, f, packed[f], kPacked[f], scales[f], inputs);
    }
    std::vector<Matrix> result;
    int64_t seen[3] = {};
    for (int64_t f : formats) {
      Matrix matrix = base[f];
      const int64_t index = seen[f]++;
      matrix.data += static_cast<size_t>(index * width) * matrix.row_bytes;
      if (matrix.scales) matrix.scales += index * width * matrix.blocks;
      result.push_back(matrix);
    }
    return result;
  }

  static Matrix float_matrix(const Tensor& weights, int64_t inputs) {
    require(weights.type == kFloat || weights.type == kFloat16 || weights.type == kBfloat16, "float_weights has element type ",
            weights.type, ", not float, float16 or bfloat16");
    require(weights.dim(2) == inputs, "float_weights has ", weights.dim(2), " columns, x ", inputs);
    const Storage storage = weights.type == kFloat ? Storage::fp32 : weights.type == kFloat16 ? Storage::fp16 : Storage::bf16;
    const size_t row_bytes = static_cast<size_t>(inputs) * (storage == Storage::fp32 ? 4 : 2);
    return {storage, weights.as<uint8_t>(), row_bytes, nullptr, inputs, 0, 0};
  }

  static Matrix quantized_matrix(const Context& context, int f, const Tensor& packed, const char* name, Tensor& scales,
                                 int64_t inputs) {
    scales = context.required(f == 1 ? 5 : 7, f == 1 ? "int8_scales" : "int4_scales", 3);
    require(scales.dim(0) == packed.dim(0) && scales.dim(1) == packed.dim(1), "the scales of ", name, " have other slots or rows");
    const int64_t blocks = scales.dim(2), padded = packed.dim(2) * (f == 1 ? 1 : 2);
    require(blocks > 0 && padded % blocks == 0, name, " has ", padded, " columns for ", blocks, " scales a row");
    const int64_t block = padded / blocks;
    require(block > 0 && block % 16 == 0, name, " has blocks of ", block, ", not a multiple of 16");
    require((inputs + block - 1) / block == blocks, name, " has ", blocks, " blocks of ", block, " for ", inputs, " columns");
    return {f == 1 ? Storage::int8 : Storage::int4, packed.as<uint8_t>(), static_cast<size_t>(packed.dim(2)), scales.as<float>(),
            inputs, block, blocks};
  }
};

}  // namespace

OrtCustomOp* expert_gemm_op() { return custom_op<ExpertGemm>(); }

}  // namespace rq
