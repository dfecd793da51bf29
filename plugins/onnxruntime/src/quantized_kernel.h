// Rows of x rounded to int8 times panels of quantized weights, block by block: integers within a block, one fp32 chain
// per output over the blocks. Included by kernels_body.h.

// The same block of several panels, which are read side by side. The next block of each is `stride` further.
struct PanelBlock {
  const uint8_t* weights;
  int64_t stride;
  const uint8_t* scales;
  int64_t scales_stride;
};

// What dot_int4 multiplies for the numbers in four bits: not negative, and more than the number by offset_of.
template <Storage storage>
inline Ints numbers_of(Ints nibbles) {
  if constexpr (storage == Storage::mxfp4) return look_up(kE2m1Offset, nibbles);
  else return nibbles;
}
constexpr int32_t offset_of(Storage storage) {
  return storage == Storage::int8 ? kInt8Offset : storage == Storage::mxfp4 ? kE2m1Largest : 8;
}

// The scales of kLanes rows, times that of a row of x.
template <Storage storage>
inline Floats scales_with(const uint8_t* scales, int64_t lane, float scale) {
  if constexpr (scale_bytes(storage) == 1) return multiply(load_powers(scales + lane), set(scale * kE2m1Unit));
  else return multiply(load(reinterpret_cast<const float*>(scales) + lane), set(scale));
}

// Instructions per row and panel for a line, 64 bytes of the panel.
constexpr int instructions_of(Storage storage) { return (storage == Storage::int8 ? 1 : 2) * kDotInstructions; }

// sum[i][p] += dot(x[i], 16 rows of panel p) over the block; the weights are still offset by offset_of.
template <int R, int P>
__attribute__((always_inline)) inline void add_int8_columns(const uint8_t* const* x, const PanelBlock& block, int64_t end,
                                                            Ints (&sum)[R][P][kVectors]) {
  const uint8_t* line = block.weights;
  for (int64_t c = 0; c < end; c += 4, line += kPanel * 4) {
    Ints weights[P][kVectors];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      prefetch<P, R * instructions_of(Storage::int8)>(line + p * block.stride);
      for (int v = 0; v < kVectors; ++v) weights[p][v] = load_ints(line + p * block.stride + v * kLanes * 4);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Ints four = spread(x[i] + c);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) sum[i][p][v] = dot_int8(sum[i][p][v], weights[p][v], four);
      }
    }
  }
}

// The same for the columns `begin` to `end`. Sum is the type that dot_int4 adds to.
template <Storage storage, int R, int P, typename Sum>
__attribute__((always_inline)) inline void add_int4_columns(const uint8_t* const* x, const PanelBlock& block, int64_t begin,
                                                            int64_t end, Sum (&sum)[R][P][kVectors]) {
  const uint8_t* line = block.weights + begin / 8 * (kPanel * 4);
#pragma GCC unroll 4
  for (int64_t c = begin; c < end; c += 8, line += kPanel * 4) {
    Ints low[P][kVectors], high[P][kVectors];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      prefetch<P, R * instructions_of(storage)>(line + p * block.stride);
      for (int v = 0; v < kVectors; ++v) {
        const Ints bytes = load_ints(line + p * block.stride + v * kLanes * 4);
        low[p][v] = numbers_of<storage>(low_nibbles(bytes));
        high[p][v] = numbers_of<storage>(high_nibbles(bytes));
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Ints first = spread(x[i] + c), second = spread(x[i] + c + 4);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][p][v] = dot_int4(dot_int4(sum[i][p][v], low[p][v], first), high[p][v], second);
        }
      }
    }
  }
}

// A Partial holds the products of `step` columns without overflow.
template <Storage storage, int step, int R, int P>
void add_int4_partials(const uint8_t* const* x, const PanelBlock& block, int64_t columns, Ints (&total)[R][P][kVectors]) {
  for (int64_t begin = 0; begin < columns; begin += step) {
    Partial partial[R][P][kVectors];
    add_int4_columns<storage>(x, block, begin, begin + step, partial);
    for (int i = 0; i < R; ++i) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) total[i][p][v] = widen(total[i][p][v], partial[i][p][v]);
      }
    }
  }
}

#ifdef RQ_MATRIX_PRODUCTS
#include "matrix_products.h"
constexpr bool has_matrix_products(int rows) { return rows % 2 == 0; }
#else
constexpr bool has_matrix_products(int) { return false; }
template <Storage storage, typename... Arguments>
void add_matrix_products(const Arguments&...);
#endif

template <Storage storage, int R, int P>
void add_products(const uint8_t* const* x, const PanelBlock& block, int64_t columns, Ints (&total)[R][P][kVectors]) {
  if constexpr (has_matrix_products(R)) add_matrix_products<storage>(x, block, columns, total);
  else if constexpr (storage == Storage::int8) add_int8_columns(x, block, columns, total);
  else if constexpr (kPartialColumns >= kMaxBlock) add_int4_columns<storage>(x, block, 0, columns, total);
  else if (storage == Storage::int4 && columns % kPartialColumns == 0) {
    add_int4_partials<storage, kPartialColumns>(x, block, columns, total);
  } else {
    add_int4_partials<storage, 16>(x, block, columns, total);  // numbers of mxfp4 are up to 24
  }
}

// Adds block `b` of R rows of x times P panels to out[row][16] of each panel, which are `out_stride` apart.
template <Storage storage, int R, int P>
RQ_OWN_REGISTERS void multiply_block(const uint8_t* const* x, int64_t b, const QuantizedLayout& layout, const PanelBlock& block,
                                     int64_t out_stride, float* out) {
  QuantizedBlock header[R];
  const uint8_t* numbers[R];
  Ints total[R][P][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const uint8_t* record = x[i] + b * layout.block_bytes;
    memcpy(&header[i], record, sizeof header[i]);
    numbers[i] = record + sizeof header[i];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < kVectors; ++v) total[i][p][v] = set(-offset_of(storage) * header[i].sum);
    }
  }
  add_products<storage>(numbers, block, layout.block, total);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* sum = out + p * out_stride + i * kPanel + v * kLanes;
        const Floats scale = scales_with<storage>(block.scales + p * block.scales_stride, v * kLanes, header[i].scale);
        store(sum, add(load(sum), multiply(to_floats(total[i][p][v]), scale)));
      }
    }
  }
}

// All rows, R at a time, times P panels: panel `first`, and further panels at distances of `apart`.
template <Storage storage, int R, int P>
void multiply_blocks(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     int64_t apart, float* out) {
  constexpr int64_t kScalesAhead = 8;  // blocks
  constexpr int64_t kScales = kPanel * scale_bytes(storage);  // bytes of a panel's scales for a block
  const int64_t panel_bytes = static_cast<int64_t>(weights.panel_bytes), scales = weights.blocks * kScales;
  PanelBlock block{weights.data + first * panel_bytes, apart * panel_bytes, weights.scales + first * scales, apart * scales};
  const int64_t out_stride = apart * rows * kPanel;
  const Parts<R> parts(rows);
  for (int p = 0; p < P; ++p) memset(out + p * out_stride, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  for (int64_t b = 0; b < weights.blocks; ++b, block.weights += panel_bytes / weights.blocks, block.scales += kScales) {
    for (int p = 0; p < P; ++p) __builtin_prefetch(block.scales + p * block.scales_stride + kScalesAhead * kScales);
    parts.each([&](auto count, int64_t row) {
      multiply_block<storage, count, P>(x + row, b, layout, block, out_stride, out + row * kPanel);
    });
  }
}

// As many rows at a time as fit into registers, and as many panels side by side as the remaining registers allow.
template <Storage storage>
void multiply_panels(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     int64_t count, float* out) {
  with_rows<kQuantizedRows>(rows, [&](auto R) {
    in_stretches<quantized_panels(R, R * instructions_of(storage))>(count, [&](auto P, int64_t panel, int64_t apart) {
      multiply_blocks<storage, R, P>(x, rows, layout, weights, first + panel, apart, out + panel * rows * kPanel);
    });
  });
}

void multiply_quantized(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                        int64_t first, int64_t count, float* out) {
  switch (weights.storage) {
    case Storage::int8: return multiply_panels<Storage::int8>(x, rows, layout, weights, first, count, out);
    case Storage::mxfp4: return multiply_panels<Storage::mxfp4>(x, rows, layout, weights, first, count, out);
    default: return multiply_panels<Storage::int4>(x, rows, layout, weights, first, count, out);
  }
}
