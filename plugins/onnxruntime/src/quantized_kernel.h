// Rows of x rounded to int8 times panels of quantized weights, block by block: whole numbers inside a block, one fp32 chain
// per output over the blocks. Included by kernels_body.h.

// total[i][p] += dot(x[i], 16 rows of panel p) over a block; the weights are still offset, int8 by kInt8Offset, int4 by 8.
// The P panels are `stride` bytes apart and read side by side.
template <int R, int P>
void add_int8_products(const uint8_t* const* x, const uint8_t* w, size_t stride, int64_t block,
                       Ints (*total)[P][kVectors]) {
  for (int64_t c = 0; c < block; c += 4, w += kPanel * 4) {
    for (int p = 0; p < P; ++p) {
      prefetch<P>(w + p * stride);
      Ints weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = load_ints(w + p * stride + v * kLanes * 4);
      for (int i = 0; i < R; ++i) {
        const Ints four = spread(x[i] + c);
        for (int v = 0; v < kVectors; ++v) total[i][p][v] = dot_int8(total[i][p][v], weights[v], four);
      }
    }
  }
}

// A Partial holds the products of up to 32 columns without overflow: `step` of them.
template <int R, int P, int step>
void add_int4_products(const uint8_t* const* x, const uint8_t* w, size_t stride, int64_t block,
                       Ints (*total)[P][kVectors]) {
  for (int64_t begin = 0; begin < block; begin += step) {
    Partial partial[R][P][kVectors];
#pragma GCC unroll 4
    for (int64_t c = begin; c < begin + step; c += 8, w += kPanel * 4) {
      for (int p = 0; p < P; ++p) {
        prefetch<P>(w + p * stride);
        Ints low[kVectors], high[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const Ints bytes = load_ints(w + p * stride + v * kLanes * 4);
          low[v] = low_nibbles(bytes);
          high[v] = high_nibbles(bytes);
        }
        for (int i = 0; i < R; ++i) {
          const Ints first = spread(x[i] + c), second = spread(x[i] + c + 4);
          for (int v = 0; v < kVectors; ++v) {
            partial[i][p][v] = dot_int4(dot_int4(partial[i][p][v], low[v], first), high[v], second);
          }
        }
      }
    }
    for (int i = 0; i < R; ++i) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < kVectors; ++v) total[i][p][v] = widen(total[i][p][v], partial[i][p][v]);
      }
    }
  }
}

template <Storage storage, int R, int P>
void add_products(const uint8_t* const* x, const uint8_t* w, size_t stride, int64_t block, Ints (*total)[P][kVectors]) {
  if constexpr (storage == Storage::int8) return add_int8_products<R, P>(x, w, stride, block, total);
  if (block % 32 == 0) return add_int4_products<R, P, 32>(x, w, stride, block, total);
  add_int4_products<R, P, 16>(x, w, stride, block, total);
}

// Adds block `b` of R rows of x times P panels to out[panel][row][16], of which there are R rows if there is more than a panel.
template <Storage storage, int R, int P>
void multiply_block(const uint8_t* const* x, int64_t b, const QuantizedLayout& layout, const uint8_t* w, size_t stride,
                    const float* scales, float* out) {
  constexpr int32_t kOffset = storage == Storage::int8 ? kInt8Offset : 8;
  QuantizedBlock header[R];
  const uint8_t* numbers[R];
  Ints total[R][P][kVectors];
  for (int i = 0; i < R; ++i) {
    const uint8_t* block = x[i] + b * layout.block_bytes;
    memcpy(&header[i], block, sizeof header[i]);
    numbers[i] = block + sizeof header[i];
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < kVectors; ++v) total[i][p][v] = set(-kOffset * header[i].sum);
    }
  }
  add_products<storage, R, P>(numbers, w, stride, layout.block, total);
  for (int p = 0; p < P; ++p) {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* sum = out + (p * R + i) * kPanel + v * kLanes;
        const Floats scale = multiply(load(scales + p * layout.blocks * kPanel + v * kLanes), set(header[i].scale));
        store(sum, add(load(sum), multiply(to_floats(total[i][p][v]), scale)));
      }
    }
  }
}

template <Storage storage, int R, int P>
void multiply_block_rows(const uint8_t* const* x, int64_t rows, int64_t b, const QuantizedLayout& layout, const uint8_t* w,
                         size_t stride, const float* scales, float* out) {
  for (; rows >= R; rows -= R, x += R, out += R * kPanel) multiply_block<storage, R, P>(x, b, layout, w, stride, scales, out);
  if constexpr (R > 1 && P == 1) multiply_block_rows<storage, R - 1, P>(x, rows, b, layout, w, stride, scales, out);
}

// All rows, R at once, times P panels from `first` on.
template <Storage storage, int R, int P>
void multiply_blocks(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     float* out) {
  const uint8_t* w = weights.data + static_cast<size_t>(first) * weights.panel_bytes;
  const float* scales = weights.scales + first * weights.blocks * kPanel;
  const size_t block_bytes = weights.panel_bytes / static_cast<size_t>(weights.blocks);
  memset(out, 0, static_cast<size_t>(P * rows * kPanel) * sizeof(float));
  for (int64_t b = 0; b < weights.blocks; ++b, w += block_bytes, scales += kPanel) {
    multiply_block_rows<storage, R, P>(x, rows, b, layout, w, weights.panel_bytes, scales, out);
  }
}

// A single row leaves registers for panels side by side.
template <Storage storage>
void multiply_panels(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t first,
                     int64_t count, float* out) {
  constexpr int P = kSideBySide;
  if (rows == 1) {
    for (; count >= P; count -= P, first += P, out += P * kPanel) {
      multiply_blocks<storage, 1, P>(x, 1, layout, weights, first, out);
    }
  }
  for (; count > 0; --count, ++first, out += rows * kPanel) {
    multiply_blocks<storage, kQuantizedRows, 1>(x, rows, layout, weights, first, out);
  }
}

void multiply_quantized(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                        int64_t first, int64_t count, float* out) {
  if (weights.storage == Storage::int8) return multiply_panels<Storage::int8>(x, rows, layout, weights, first, count, out);
  multiply_panels<Storage::int4>(x, rows, layout, weights, first, count, out);
}
