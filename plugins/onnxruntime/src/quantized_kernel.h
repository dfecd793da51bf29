// Rows of x rounded to int8 times panels of quantized weights, block by block: integers within a block, one fp32 chain
// per output over the blocks. Included by kernels_body.h.

// The same block of several panels, which are read side by side. The next block of each is `stride` further.
struct PanelBlock {
  const uint8_t* weights;
  int64_t stride;
  const uint8_t* scales;
  int64_t scales_stride;
};

// Instructions per row and panel for a line, 64 bytes of the panel: products and, of few bits, some that unpack.
constexpr int instructions_of(Storage storage) {
  const int unpacking = bits_of(storage) < 4 ? 2 : 0;
  return (unpacking + (fours_of(storage) + lines_of(storage) - 1) / lines_of(storage)) * kDotInstructions;
}

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

// The same for the k-th and the following four columns of a group, up to `fours` of them; x of the first is at x[i] + c. They are
// added to `sum` and `next` in turn, which may be the same.
template <Storage storage, int k, int fours, int R, int P, typename Sum>
__attribute__((always_inline)) inline void add_fours(const uint8_t* const* x, int64_t c,
                                                     const Ints (&lines)[P][kVectors][lines_of(storage)],
                                                     Sum (&sum)[R][P][kVectors], Sum (&next)[R][P][kVectors]) {
  Ints weights[P][kVectors];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < kVectors; ++v) weights[p][v] = numbers_at<storage, k>(lines[p][v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const Ints four = spread(x[i] + c + 4 * k);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < kVectors; ++v) sum[i][p][v] = dot_int4(sum[i][p][v], weights[p][v], four);
    }
  }
  if constexpr (k + 1 < fours) add_fours<storage, k + 1, fours>(x, c, lines, next, sum);
}

template <Storage storage, int fours, int R, int P, typename Sum>
__attribute__((always_inline)) inline void add_group(const uint8_t* const* x, int64_t c, const uint8_t* group, int64_t stride,
                                                     Sum (&sum)[R][P][kVectors], Sum (&next)[R][P][kVectors]) {
  constexpr int count = static_cast<int>(words_of(4 * fours, bits_of(storage)));
  Ints lines[P][kVectors][lines_of(storage)];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const uint8_t* line = group + p * stride + i * kPanel * 4;
      prefetch<P, R * instructions_of(storage)>(line);
      for (int v = 0; v < kVectors; ++v) lines[p][v][i] = load_ints(line + v * kLanes * 4);
    }
  }
  add_fours<storage, 0, fours>(x, c, lines, sum, next);
}

// The same for the columns `begin` to `end`, of less than 8 bits. Sum is the type that dot_int4 adds to.
template <Storage storage, int R, int P, typename Sum>
__attribute__((always_inline)) inline void add_columns(const uint8_t* const* x, const PanelBlock& block, int64_t begin, int64_t end,
                                                       Sum (&sum)[R][P][kVectors], Sum (&next)[R][P][kVectors]) {
  constexpr int fours = fours_of(storage), columns = columns_of(storage);
  const uint8_t* group = block.weights + begin / columns * bytes_of(storage);
  if constexpr (fours == 2) {
#pragma GCC unroll 4
    for (int64_t c = begin; c < end; c += columns, group += bytes_of(storage)) {
      add_group<storage, fours>(x, c, group, block.stride, sum, next);
    }
  } else {
    int64_t c = begin;
    for (; c + columns <= end; c += columns, group += bytes_of(storage)) {
      add_group<storage, fours>(x, c, group, block.stride, sum, next);
    }
    if (storage == Storage::int3 && c < end) add_group<storage, fours / 2>(x, c, group, block.stride, sum, next);
  }
}

// Columns whose products a Partial holds without overflow: kPartialColumns of int4. Numbers of mxfp4 are up to 24.
constexpr int partial_columns(Storage storage) {
  return storage == Storage::mxfp4 ? 16 : kPartialColumns * (16 >> bits_of(storage));
}

// A Partial for every `step` columns; `whole`: which divide them.
template <Storage storage, int step, bool whole, int R, int P>
void add_partials(const uint8_t* const* x, const PanelBlock& block, int64_t columns, Ints (&total)[R][P][kVectors]) {
  for (int64_t begin = 0; begin < columns; begin += step) {
    Partial partial[R][P][kVectors];
    add_columns<storage>(x, block, begin, whole || begin + step < columns ? begin + step : columns, partial, partial);
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
  else if constexpr (kPartialColumns >= kMaxBlock && fours_of(storage) > 1 && R * P * kVectors <= 4) {
    // Few sums, to each of which many products of a line are added, would wait for each other.
    Ints others[R][P][kVectors];
    for (int i = 0; i < R; ++i) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) others[i][p][v] = set(0);
      }
    }
    add_columns<storage>(x, block, 0, columns, total, others);
    for (int i = 0; i < R; ++i) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) total[i][p][v] = add(total[i][p][v], others[i][p][v]);
      }
    }
  } else if constexpr (kPartialColumns >= kMaxBlock) add_columns<storage>(x, block, 0, columns, total, total);
  else {
    constexpr int step = partial_columns(storage);
    if (columns % step == 0) add_partials<storage, step, true>(x, block, columns, total);
    else add_partials<storage, step, false>(x, block, columns, total);
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
    case Storage::int3: return multiply_panels<Storage::int3>(x, rows, layout, weights, first, count, out);
    case Storage::int2: return multiply_panels<Storage::int2>(x, rows, layout, weights, first, count, out);
    default: return multiply_panels<Storage::int4>(x, rows, layout, weights, first, count, out);
  }
}
