// Rows of x rounded to int8 times one panel of quantized weights, block by block: whole numbers inside a block, one fp32 chain
// per output over the blocks. Included by kernels_body.h.

// total[i] += dot(x[i], 16 rows of weights) over a block; the weights are still offset, int8 by kInt8Offset, int4 by 8.
template <int R>
void add_int8_products(const uint8_t* const* x, const uint8_t* w, int64_t block, Ints (*total)[kVectors]) {
  for (int64_t c = 0; c < block; c += 4, w += kPanel * 4) {
    __builtin_prefetch(w + kAhead);
    Ints weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = load_ints(w + v * kLanes * 4);
    for (int i = 0; i < R; ++i) {
      const Ints four = spread(x[i] + c);
      for (int v = 0; v < kVectors; ++v) total[i][v] = dot_int8(total[i][v], weights[v], four);
    }
  }
}

// A Partial holds the products of up to 32 columns without overflow: `step` of them.
template <int R, int step>
void add_int4_products(const uint8_t* const* x, const uint8_t* w, int64_t block, Ints (*total)[kVectors]) {
  for (int64_t begin = 0; begin < block; begin += step) {
    Partial partial[R][kVectors];
#pragma GCC unroll 4
    for (int64_t c = begin; c < begin + step; c += 8, w += kPanel * 4) {
      __builtin_prefetch(w + kAhead);
      Ints low[kVectors], high[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const Ints bytes = load_ints(w + v * kLanes * 4);
        low[v] = low_nibbles(bytes);
        high[v] = high_nibbles(bytes);
      }
      for (int i = 0; i < R; ++i) {
        const Ints first = spread(x[i] + c), second = spread(x[i] + c + 4);
        for (int v = 0; v < kVectors; ++v) partial[i][v] = dot_int4(dot_int4(partial[i][v], low[v], first), high[v], second);
      }
    }
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) total[i][v] = widen(total[i][v], partial[i][v]);
    }
  }
}

template <Storage storage, int R>
void add_products(const uint8_t* const* x, const uint8_t* w, int64_t block, Ints (*total)[kVectors]) {
  if constexpr (storage == Storage::int8) return add_int8_products<R>(x, w, block, total);
  if (block % 32 == 0) return add_int4_products<R, 32>(x, w, block, total);
  add_int4_products<R, 16>(x, w, block, total);
}

// Adds block `b` of R rows of x to their outputs.
template <Storage storage, int R>
void multiply_block(const uint8_t* const* x, int64_t b, const QuantizedLayout& layout, const uint8_t* w, const float* scales,
                    float* out) {
  constexpr int32_t kOffset = storage == Storage::int8 ? kInt8Offset : 8;
  QuantizedBlock header[R];
  const uint8_t* numbers[R];
  Ints total[R][kVectors];
  for (int i = 0; i < R; ++i) {
    const uint8_t* block = x[i] + b * layout.block_bytes;
    memcpy(&header[i], block, sizeof header[i]);
    numbers[i] = block + sizeof header[i];
    for (int v = 0; v < kVectors; ++v) total[i][v] = set(-kOffset * header[i].sum);
  }
  add_products<storage, R>(numbers, w, layout.block, total);
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* sum = out + i * kPanel + v * kLanes;
      const Floats scale = multiply(load(scales + v * kLanes), set(header[i].scale));
      store(sum, add(load(sum), multiply(to_floats(total[i][v]), scale)));
    }
  }
}

template <Storage storage, int R>
void multiply_block_rows(const uint8_t* const* x, int64_t rows, int64_t b, const QuantizedLayout& layout, const uint8_t* w,
                         const float* scales, float* out) {
  for (; rows >= R; rows -= R, x += R, out += R * kPanel) multiply_block<storage, R>(x, b, layout, w, scales, out);
  if constexpr (R > 1) multiply_block_rows<storage, R - 1>(x, rows, b, layout, w, scales, out);
}

template <Storage storage>
void multiply_blocks(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t panel,
                     float* out) {
  const uint8_t* w = weights.data + static_cast<size_t>(panel) * weights.panel_bytes;
  const float* scales = weights.scales + panel * weights.blocks * kPanel;
  const size_t block_bytes = weights.panel_bytes / static_cast<size_t>(weights.blocks);
  memset(out, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  for (int64_t b = 0; b < weights.blocks; ++b, w += block_bytes, scales += kPanel) {
    multiply_block_rows<storage, kQuantizedRows>(x, rows, b, layout, w, scales, out);
  }
}

void multiply_quantized(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                        int64_t panel, float* out) {
  if (weights.storage == Storage::int8) return multiply_blocks<Storage::int8>(x, rows, layout, weights, panel, out);
  multiply_blocks<Storage::int4>(x, rows, layout, weights, panel, out);
}
