// AMX: one instruction multiplies 16 rows of x by the 16 rows of a panel, 64 bytes of each. A tile of weights is 16 lines of a
// panel of int8, to which other weights are unpacked first. The set's other kernels are those of avx512bf16.
#include "vnni_avx512.h"

#include "kernels.h"

namespace rq {
namespace {

#include "panel_groups.h"
#include "quantized_numbers.h"

constexpr int64_t kTileRows = 16, kLine = kPanel * 4;  // a tile has as many lines of a panel, or rows of x, of as many bytes
constexpr int64_t kTileBytes = kTileRows * kLine;
constexpr int64_t kRowsAtOnce = 64;    // of x, for which weights are unpacked once
constexpr int64_t kPairsAtOnce = 128;  // of columns of bf16
// Panels side by side. Each has sums of its own, because a product waits for the one before that adds to the same sums.
constexpr int64_t kPanelsAtOnce = 4;
// Up to so many rows, AVX-512 VNNI is used, which needs no full tiles. Integer sums are exact, so the outputs are the same.
constexpr int64_t kFewRows = 8;

// A thread has tiles, eight of 16 rows of 64 bytes, while one of these exists.
class Tiles {
 public:
  Tiles() { _tile_loadconfig(&kShapes); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static constexpr Shapes kShapes{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

enum class Numbers { bytes, bfloats };

// sums[p][i] += the products of 16 rows of x, i < 16, with panel p, all of them `steps` tiles long. The intrinsics take the number
// of a tile as a literal.
template <Numbers numbers, typename Sum>
void add_tiles(const uint8_t* x, const uint8_t* const (&panels)[kPanelsAtOnce], int64_t steps, Sum* sums) {
#define RQ_ADD_PRODUCTS(of, x, weights)                                  \
  if constexpr (numbers == Numbers::bytes) _tile_dpbsud(of, x, weights); \
  else _tile_dpbf16ps(of, x, weights)
  constexpr int64_t kSums = kRowsAtOnce * kPanel;  // of a panel
  _tile_loadd(0, sums, kLine);
  _tile_loadd(1, sums + kSums, kLine);
  _tile_loadd(2, sums + 2 * kSums, kLine);
  _tile_loadd(3, sums + 3 * kSums, kLine);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, x + step * kLine, steps * kLine);
    _tile_loadd(5, panels[0] + step * kTileBytes, kLine);
    RQ_ADD_PRODUCTS(0, 4, 5);
    _tile_loadd(6, panels[1] + step * kTileBytes, kLine);
    RQ_ADD_PRODUCTS(1, 4, 6);
    _tile_loadd(5, panels[2] + step * kTileBytes, kLine);
    RQ_ADD_PRODUCTS(2, 4, 5);
    _tile_loadd(6, panels[3] + step * kTileBytes, kLine);
    RQ_ADD_PRODUCTS(3, 4, 6);
  }
  _tile_stored(0, sums, kLine);
  _tile_stored(1, sums + kSums, kLine);
  _tile_stored(2, sums + 2 * kSums, kLine);
  _tile_stored(3, sums + 3 * kSums, kLine);
#undef RQ_ADD_PRODUCTS
}

// Sums of up to kPanelsAtOnce panels and kRowsAtOnce rows of x, and what the tiles read: rows of x, and lines of panels.
template <Numbers numbers, typename Sum, int64_t row_bytes>
struct Buffers {
  alignas(64) uint8_t x[kRowsAtOnce * row_bytes];
  alignas(64) uint8_t lines[kPanelsAtOnce][kPanel * row_bytes];
  alignas(64) Sum sums[kPanelsAtOnce][kRowsAtOnce][kPanel];

  // Adds the products with `rows` rows of x, `steps` tiles long. Those of further rows up to whole tiles are not defined.
  void add(int64_t rows, const uint8_t* const (&panels)[kPanelsAtOnce], int64_t steps) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      add_tiles<numbers>(x + row * steps * kLine, panels, steps, sums[0][row]);
    }
  }
};

// The weights of a group as lines of int8, `fours` times four columns.
template <Storage storage, int fours, int k = 0>
inline void unpack_fours(const Ints* packed, uint8_t* lines) {
  store(lines + k * kLine, numbers_at<storage, k>(packed));
  if constexpr (k + 1 < fours) unpack_fours<storage, fours, k + 1>(packed, lines);
}
template <Storage storage, int fours>
inline void unpack_group(const uint8_t* group, uint8_t* lines) {
  constexpr int count = static_cast<int>(words_of(4 * fours, bits_of(storage)));
  Ints packed[count];
  // clang-tidy counts the numbers of a vector as elements.
  for (int i = 0; i < count; ++i) packed[i] = load_ints(group + i * kLine);  // NOLINT(clang-analyzer-security.ArrayBound)
  unpack_fours<storage, fours>(packed, lines);
}
template <Storage storage>
void unpack(const uint8_t* group, int64_t columns, uint8_t* lines) {
  constexpr int64_t together = columns_of(storage);
  int64_t c = 0;
  for (; c + together <= columns; c += together, group += bytes_of(storage)) {
    unpack_group<storage, fours_of(storage)>(group, lines + c * kPanel);
  }
  if constexpr (storage == Storage::int3) {
    if (c < columns) unpack_group<storage, fours_of(storage) / 2>(group, lines + c * kPanel);
  }
}

// Up to kRowsAtOnce rows and kPanelsAtOnce panels. The outputs of a panel are `out_stride` apart from those of the next.
template <Storage storage>
void multiply_blocks(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     int64_t count, int64_t out_stride, float* out) {
  constexpr int64_t kScales = kPanel * scale_bytes(storage);  // bytes of a panel's scales for a block
  const int64_t steps = (layout.block + kLine - 1) / kLine, row_bytes = steps * kLine;
  const int64_t panel_bytes = static_cast<int64_t>(weights.panel_bytes), block_bytes = panel_bytes / weights.blocks;
  Buffers<Numbers::bytes, int32_t, kMaxBlock> buffers;
  for (int64_t b = 0; b < weights.blocks; ++b) {
    QuantizedBlock header[kRowsAtOnce];
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* record = x[i] + b * layout.block_bytes;
      memcpy(&header[i], record, sizeof header[i]);
      memcpy(buffers.x + i * row_bytes, record + sizeof header[i], static_cast<size_t>(layout.block));
      memset(buffers.x + i * row_bytes + layout.block, 0, static_cast<size_t>(row_bytes - layout.block));
    }
    const uint8_t* panels[kPanelsAtOnce];
    for (int64_t p = 0; p < kPanelsAtOnce; ++p) {
      const uint8_t* block = weights.data + (first + p) * panel_bytes + b * block_bytes;
      if (p < count) unpack<storage>(block, layout.block, buffers.lines[p]);
      panels[p] = buffers.lines[p < count ? p : 0];
    }
    memset(buffers.sums, 0, sizeof buffers.sums);
    buffers.add(rows, panels, steps);
    for (int64_t p = 0; p < count; ++p) {
      const uint8_t* scales = weights.scales + ((first + p) * weights.blocks + b) * kScales;
      for (int64_t i = 0; i < rows; ++i) {
        float* sum = out + p * out_stride + i * kPanel;
        const Ints products = load_ints(reinterpret_cast<const uint8_t*>(buffers.sums[p][i]));
        const Ints total = add(products, set(-offset_of(storage) * header[i].sum));
        const Floats scale = scales_with<storage>(scales, 0, header[i].scale);
        store(sum, add(b ? load(sum) : set(0.0f), multiply(to_floats(total), scale)));
      }
    }
  }
}

// `columns` of a panel of bf16 as `pairs` lines of two columns; what is beyond them is 0.
void pair_up(const uint8_t* line, int64_t columns, int64_t pairs, uint8_t* out) {
  const int64_t complete = columns / 2 < pairs ? columns / 2 : pairs;
  for (int64_t c = 0; c < complete; ++c) store(out + c * kLine, paired(load_ints(line + c * kLine)));
  if (complete == pairs) return;
  memset(out + complete * kLine, 0, static_cast<size_t>((pairs - complete) * kLine));
  if (columns % 2 == 0) return;
  uint8_t last[kLine] = {};
  memcpy(last, line + complete * kLine, kLine / 2);
  store(out + complete * kLine, paired(load_ints(last)));
}

void multiply_pairs(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, int64_t out_stride,
                    float* out) {
  const int64_t all = (weights.columns + 1) / 2, panel_bytes = static_cast<int64_t>(weights.panel_bytes);
  Buffers<Numbers::bfloats, float, kPairsAtOnce * 4> buffers;
  memset(buffers.sums, 0, sizeof buffers.sums);
  for (int64_t begin = 0; begin < all; begin += kPairsAtOnce) {
    const int64_t pairs = all - begin < kPairsAtOnce ? all - begin : kPairsAtOnce;
    const int64_t steps = (pairs + kTileRows - 1) / kTileRows, row_bytes = steps * kLine;
    for (int64_t i = 0; i < rows; ++i) {
      memcpy(buffers.x + i * row_bytes, x[i] + begin, static_cast<size_t>(pairs * 4));
      memset(buffers.x + i * row_bytes + pairs * 4, 0, static_cast<size_t>(row_bytes - pairs * 4));
    }
    const uint8_t* panels[kPanelsAtOnce];
    for (int64_t p = 0; p < kPanelsAtOnce; ++p) {
      const uint8_t* lines = weights.data + (first + p) * panel_bytes + begin * kLine;
      if (p < count) pair_up(lines, weights.columns - 2 * begin, steps * kTileRows, buffers.lines[p]);
      panels[p] = buffers.lines[p < count ? p : 0];
    }
    buffers.add(rows, panels, steps);
  }
  for (int64_t p = 0; p < count; ++p) memcpy(out + p * out_stride, buffers.sums[p], static_cast<size_t>(rows * kLine));
}

// multiply(first row, rows, first panel, panels, out of these) for as many at a time as the buffers hold.
template <typename Multiply>
void in_parts(int64_t rows, int64_t panels, float* out, Multiply multiply) {
  for (int64_t panel = 0; panel < panels; panel += kPanelsAtOnce) {
    const int64_t some = panels - panel < kPanelsAtOnce ? panels - panel : kPanelsAtOnce;
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
      const int64_t these = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
      multiply(row, these, panel, some, out + (panel * rows + row) * kPanel);
    }
  }
}

void multiply_bfloats(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t panels, float* out) {
  const Tiles tiles;
  in_parts(rows, panels, out, [&](int64_t row, int64_t these, int64_t panel, int64_t some, float* into) {
    multiply_pairs(x + row, these, weights, first + panel, some, rows * kPanel, into);
  });
}

void multiply_quantized(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                        int64_t first, int64_t panels, float* out) {
  if (rows <= kFewRows) return kAvx512VnniQuantized(x, rows, layout, weights, first, panels, out);
  const Tiles tiles;
  in_parts(rows, panels, out, [&](int64_t row, int64_t these, int64_t panel, int64_t some, float* into) {
    const auto multiply = [&](auto blocks) { blocks(x + row, these, layout, weights, first + panel, some, rows * kPanel, into); };
    switch (weights.storage) {
      case Storage::int8: return multiply(multiply_blocks<Storage::int8>);
      case Storage::mxfp4: return multiply(multiply_blocks<Storage::mxfp4>);
      case Storage::int3: return multiply(multiply_blocks<Storage::int3>);
      case Storage::int2: return multiply(multiply_blocks<Storage::int2>);
      default: return multiply(multiply_blocks<Storage::int4>);
    }
  });
}

}  // namespace

const QuantizedProducts kAmxQuantized = multiply_quantized;
const BfloatProducts kAmxBfloats = multiply_bfloats;

}  // namespace rq
