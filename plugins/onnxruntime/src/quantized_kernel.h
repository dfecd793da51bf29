// Rows of x rounded to int8 times panels of quantized weights, block by block: whole numbers inside a block, one fp32 chain
// per output over the blocks. Included by kernels_body.h.

// The same block of several panels, which are read side by side.
struct PanelBlock {
  const uint8_t* weights;  // of the first panel; the next ones' are `stride` bytes apart
  size_t stride;
  const float* scales;  // `scales_stride` apart
  int64_t scales_stride;
  int64_t ahead;  // bytes from these weights to those that are prefetched meanwhile; not where one panel is read in order
};

// Instructions for each row and panel in which a line meets x.
constexpr int products_of(Storage storage) { return storage == Storage::int4 ? 2 : 1; }
// Whether so many rows read panels in huge pages in order, one after the other; more compute for too long between two lines.
constexpr bool reads_in_order(Storage storage, int rows) { return kReadsHugePagesInOrder && rows * products_of(storage) <= 8; }
// Some lines of such a panel come in turn: their sums do not wait for each other.
constexpr int lines_in_turn(Storage storage, int rows) {
  const int lines = 4 / products_of(storage) / rows;
  return lines > 1 ? lines : 1;
}
template <Storage storage, int R, int P, bool in_order>
inline void prefetch_line(const uint8_t* line, const PanelBlock& block) {
  if constexpr (in_order) prefetch_in_order<R * products_of(storage)>(line);
  else prefetch<P>(line, block.ahead);
}

// sum[i][p][u] += dot(x[i], 16 rows of panel p) over every U-th line, from the u-th on, of the block's columns `begin` to `end`;
// the weights are still offset, int8 by kInt8Offset, int4 by 8. A line is 64 bytes of a panel.
template <bool in_order, int R, int P, int U>
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
        prefetch_line<Storage::int8, R, P, in_order>(line, block);
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
template <bool in_order, int R, int P, int U, typename Sum>
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
        prefetch_line<Storage::int4, R, P, in_order>(line, block);
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
    add_int4_columns<false>(x, block, begin, begin + step, partial);
    for (int i = 0; i < R; ++i) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) total[i][p][0][v] = widen(total[i][p][0][v], partial[i][p][0][v]);
      }
    }
  }
}

template <Storage storage, bool in_order, int R, int P, int U>
void add_products(const uint8_t* const* x, const PanelBlock& block, int64_t columns, Ints (&total)[R][P][U][kVectors]) {
  if constexpr (storage == Storage::int8) add_int8_columns<in_order>(x, block, columns, total);
  else if constexpr (kPartialColumns >= kMaxBlock) add_int4_columns<in_order>(x, block, 0, columns, total);
  else if (columns % kPartialColumns == 0) add_int4_partials<kPartialColumns>(x, block, columns, total);
  else add_int4_partials<16>(x, block, columns, total);
}

// Adds block `b` of R rows of x times P panels to out[panel][row][16], of which there are `rows` rows.
template <Storage storage, int R, int P, bool in_order>
void multiply_block(const uint8_t* const* x, int64_t b, const QuantizedLayout& layout, const PanelBlock& block, int64_t rows,
                    float* out) {
  constexpr int U = in_order ? lines_in_turn(storage, R) : 1;
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
  add_products<storage, in_order>(numbers, block, layout.block, total);
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
template <Storage storage, int R, int P, bool in_order>
void multiply_block_rows(const uint8_t* const* x, int64_t count, int64_t b, const QuantizedLayout& layout, const PanelBlock& block,
                         int64_t rows, float* out) {
  for (; count >= R; count -= R, x += R, out += R * kPanel) multiply_block<storage, R, P, in_order>(x, b, layout, block, rows, out);
  if constexpr (R > 1) {
    if (count > 0) multiply_block_rows<storage, R - 1, P, in_order>(x, count, b, layout, block, rows, out);
  }
}

// All rows, R at once, times P panels from `first` on.
template <Storage storage, int R, int P, bool in_order>
void multiply_blocks(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     float* out) {
  constexpr int64_t kScalesAhead = 8;  // blocks
  const int64_t panel_bytes = static_cast<int64_t>(weights.panel_bytes), block_bytes = panel_bytes / weights.blocks;
  PanelBlock block{weights.data + first * panel_bytes, weights.panel_bytes, weights.scales + first * weights.blocks * kPanel,
                   weights.blocks * kPanel, prefetch_distance(P)};
  memset(out, 0, static_cast<size_t>(P * rows * kPanel) * sizeof(float));
  for (int64_t b = 0; b < weights.blocks; ++b, block.weights += block_bytes, block.scales += kPanel) {
    // The end of a panel is followed by the next one, which is read already: on to the one after the P panels.
    if (b * block_bytes + prefetch_distance(P) >= panel_bytes) block.ahead = prefetch_distance(P) + (P - 1) * panel_bytes;
    if constexpr (in_order) __builtin_prefetch(block.scales + kScalesAhead * kPanel);
    multiply_block_rows<storage, R, P, in_order>(x, rows, b, layout, block, rows, out);
  }
}

// `count` panels, P side by side.
template <Storage storage, int R, int P, bool in_order>
void multiply_panels_by(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                        int64_t count, float* out) {
  for (; count >= P; count -= P, first += P, out += P * rows * kPanel) {
    multiply_blocks<storage, R, P, in_order>(x, rows, layout, weights, first, out);
  }
  if constexpr (P > 1) multiply_panels_by<storage, R, 1, in_order>(x, rows, layout, weights, first, count, out);
}

// As many rows at once as registers hold, and side by side the panels that these leave room for.
template <Storage storage, int R = 1>
void multiply_panels(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     int64_t count, float* out) {
  if constexpr (R < kQuantizedRows) {
    if (rows > R) return multiply_panels<storage, R + 1>(x, rows, layout, weights, first, count, out);
  }
  if constexpr (reads_in_order(storage, R)) {
    if (weights.huge_pages) return multiply_panels_by<storage, R, 1, true>(x, rows, layout, weights, first, count, out);
  }
  multiply_panels_by<storage, R, quantized_panels(R), false>(x, rows, layout, weights, first, count, out);
}

void multiply_quantized(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                        int64_t first, int64_t count, float* out) {
  if (weights.storage == Storage::int8) return multiply_panels<Storage::int8>(x, rows, layout, weights, first, count, out);
  multiply_panels<Storage::int4>(x, rows, layout, weights, first, count, out);
}
