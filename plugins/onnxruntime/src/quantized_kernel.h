// Rows of x rounded to int8 times panels of quantized weights, block by block: whole numbers inside a block, one fp32 chain
// per output over the blocks. Included by kernels_body.h.

// The same block of several panels, which are read side by side.
struct PanelBlock {
  const uint8_t* weights;  // of the first panel; the next ones' are `stride` bytes apart
  size_t stride;
  const float* scales;  // `scales_stride` apart
  int64_t scales_stride;
  int64_t ahead;  // bytes from these weights to those that are prefetched meanwhile
};

// sum[i][p][u] += dot(x[i], 16 rows of panel p) over every U-th line, from the u-th on, of the block's columns `begin` to `end`;
// the weights are still offset, int8 by kInt8Offset, int4 by 8. A line is 64 bytes of a panel.
template <int R, int P, int U>
__attribute__((always_inline)) inline void add_int8_columns(const uint8_t* const* x, const PanelBlock& block, int64_t end,
                                                            Ints (&sum)[R][P][U][kVectors]) {
  const uint8_t* w = block.weights;
  for (int64_t c = 0; c < end; c += 4 * U, w += kPanel * 4 * U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      Ints weights[P][kVectors];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* line = w + p * block.stride + u * kPanel * 4;
        if constexpr (R > 1 || U == 1) prefetch<P>(line, block.ahead);  // else the processor does it best
        for (int v = 0; v < kVectors; ++v) weights[p][v] = load_ints(line + v * kLanes * 4);
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Ints four = spread(x[i] + c + 4 * u);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          for (int v = 0; v < kVectors; ++v) sum[i][p][u][v] = dot_int8(sum[i][p][u][v], weights[p][v], four);
        }
      }
    }
  }
}

// Sum is what dot_int4 adds to.
template <int R, int P, int U, typename Sum>
__attribute__((always_inline)) inline void add_int4_columns(const uint8_t* const* x, const PanelBlock& block, int64_t begin,
                                                            int64_t end, Sum (&sum)[R][P][U][kVectors]) {
  const uint8_t* w = block.weights + begin / 8 * (kPanel * 4);
#pragma GCC unroll 4
  for (int64_t c = begin; c < end; c += 8 * U, w += kPanel * 4 * U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      Ints low[P][kVectors], high[P][kVectors];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* line = w + p * block.stride + u * kPanel * 4;
        if constexpr (R > 1 || U == 1) prefetch<P>(line, block.ahead);  // else the processor does it best
        for (int v = 0; v < kVectors; ++v) {
          const Ints bytes = load_ints(line + v * kLanes * 4);
          low[p][v] = low_nibbles(bytes);
          high[p][v] = high_nibbles(bytes);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Ints first = spread(x[i] + c + 8 * u), second = spread(x[i] + c + 8 * u + 4);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          for (int v = 0; v < kVectors; ++v) {
            sum[i][p][u][v] = dot_int4(dot_int4(sum[i][p][u][v], low[p][v], first), high[p][v], second);
          }
        }
      }
    }
  }
}

// A Partial holds the products of `step` columns without overflow.
template <int step, int R, int P>
void add_int4_partials(const uint8_t* const* x, const PanelBlock& block, int64_t columns, Ints (&total)[R][P][1][kVectors]) {
  for (int64_t begin = 0; begin < columns; begin += step) {
    Partial partial[R][P][1][kVectors];
    add_int4_columns(x, block, begin, begin + step, partial);
    for (int i = 0; i < R; ++i) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) total[i][p][0][v] = widen(total[i][p][0][v], partial[i][p][0][v]);
      }
    }
  }
}

template <Storage storage, int R, int P, int U>
void add_products(const uint8_t* const* x, const PanelBlock& block, int64_t columns, Ints (&total)[R][P][U][kVectors]) {
  if constexpr (storage == Storage::int8) add_int8_columns(x, block, columns, total);
  else if constexpr (kPartialColumns >= kMaxBlock) add_int4_columns(x, block, 0, columns, total);
  else if (columns % kPartialColumns == 0) add_int4_partials<kPartialColumns>(x, block, columns, total);
  else add_int4_partials<16>(x, block, columns, total);
}

// Adds block `b` of R rows of x times P panels to out[panel][row][16], of which there are `rows` rows.
template <Storage storage, int R, int P, int U>
void multiply_block(const uint8_t* const* x, int64_t b, const QuantizedLayout& layout, const PanelBlock& block, int64_t rows,
                    float* out) {
  constexpr int32_t kOffset = storage == Storage::int8 ? kInt8Offset : 8;
  QuantizedBlock header[R];
  const uint8_t* numbers[R];
  Ints total[R][P][U][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const uint8_t* record = x[i] + b * layout.block_bytes;
    memcpy(&header[i], record, sizeof header[i]);
    numbers[i] = record + sizeof header[i];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      for (int u = 0; u < U; ++u) {
        for (int v = 0; v < kVectors; ++v) total[i][p][u][v] = set(u == 0 ? -kOffset * header[i].sum : 0);
      }
    }
  }
  add_products<storage>(numbers, block, layout.block, total);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* sum = out + (p * rows + i) * kPanel + v * kLanes;
        const Floats scale = multiply(load(block.scales + p * block.scales_stride + v * kLanes), set(header[i].scale));
        for (int u = 1; u < U; ++u) total[i][p][0][v] = add(total[i][p][0][v], total[i][p][u][v]);
        store(sum, add(load(sum), multiply(to_floats(total[i][p][0][v]), scale)));
      }
    }
  }
}

// The first `count` rows, R at once.
template <Storage storage, int R, int P, int U>
void multiply_block_rows(const uint8_t* const* x, int64_t count, int64_t b, const QuantizedLayout& layout, const PanelBlock& block,
                         int64_t rows, float* out) {
  for (; count >= R; count -= R, x += R, out += R * kPanel) multiply_block<storage, R, P, U>(x, b, layout, block, rows, out);
  if constexpr (R > 1) {
    if (count > 0) multiply_block_rows<storage, R - 1, P, U>(x, count, b, layout, block, rows, out);
  }
}

// All rows, R at once, times P panels from `first` on, U lines of each in turn.
template <Storage storage, int R, int P, int U = 1>
void multiply_blocks(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     float* out) {
  const int64_t panel_bytes = static_cast<int64_t>(weights.panel_bytes), block_bytes = panel_bytes / weights.blocks;
  PanelBlock block{weights.data + first * panel_bytes, weights.panel_bytes, weights.scales + first * weights.blocks * kPanel,
                   weights.blocks * kPanel, prefetch_distance(P)};
  memset(out, 0, static_cast<size_t>(P * rows * kPanel) * sizeof(float));
  for (int64_t b = 0; b < weights.blocks; ++b, block.weights += block_bytes, block.scales += kPanel) {
    // The end of a panel is followed by the next one, which is read already: on to the one after the P panels.
    if (b * block_bytes + prefetch_distance(P) >= panel_bytes) block.ahead = prefetch_distance(P) + (P - 1) * panel_bytes;
    multiply_block_rows<storage, R, P, U>(x, rows, b, layout, block, rows, out);
  }
}

// As many rows at once as registers hold, and side by side the panels that these leave room for.
template <Storage storage, int R = 1>
void multiply_panels(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     int64_t count, float* out) {
  if constexpr (R < kQuantizedRows) {
    if (rows > R) return multiply_panels<storage, R + 1>(x, rows, layout, weights, first, count, out);
  }
  if constexpr (R <= kSequentialRows) {
    constexpr int kLines = storage == Storage::int8 ? 4 : 2;  // of 16 columns; their sums do not wait for each other
    if (weights.huge_pages) {
      for (; count > 0; --count, ++first, out += R * kPanel) multiply_blocks<storage, R, 1, kLines>(x, R, layout, weights, first, out);
      return;
    }
  }
  constexpr int P = quantized_panels(R);
  for (; count >= P; count -= P, first += P, out += P * rows * kPanel) {
    multiply_blocks<storage, R, P>(x, rows, layout, weights, first, out);
  }
  if constexpr (P > 1) {
    for (; count > 0; --count, ++first, out += rows * kPanel) multiply_blocks<storage, R, 1>(x, rows, layout, weights, first, out);
  }
}

void multiply_quantized(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                        int64_t first, int64_t count, float* out) {
  if (weights.storage == Storage::int8) return multiply_panels<Storage::int8>(x, rows, layout, weights, first, count, out);
  multiply_panels<Storage::int4>(x, rows, layout, weights, first, count, out);
}
