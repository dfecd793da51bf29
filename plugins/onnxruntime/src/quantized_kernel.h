// Rows of x rounded to int8 times one panel of quantized weights, block by block: whole numbers inside a block, one fp32 chain
// per output over the blocks. Included by kernels_body.h.
//
// A Products class knows one way to multiply a block: kZeroPoint is the offset of its weights, kWords says which form of x it
// reads, kRows how many rows at once, and
//   accumulate<R>(x, weights, block, total): total[i] += dot(x[i], 16 offset rows of weights)
// kPaired: the total has also the sums of x0 * x1 and w0 * w1 over the pairs of neighbouring columns; `own_pairs` gives the
// latter.

using Accumulators = Ints[kVectors];

struct WeightBlock {
  const uint8_t* data;
  const float* scales;
  Accumulators pairs;
};

template <typename Products, int R>
void multiply_block(const uint8_t* const* x, int64_t at, const QuantizedLayout& layout, const WeightBlock& w, float* out) {
  const uint8_t* numbers[R];
  Ints total[R][kVectors];
  for (int i = 0; i < R; ++i) {
    numbers[i] = x[i] + at + (Products::kWords ? layout.words_at : layout.bytes_at);
    const QuantizedBlock& header = *reinterpret_cast<const QuantizedBlock*>(x[i] + at);
    const int32_t start = -Products::kZeroPoint * header.sum - (Products::kPaired ? header.pairs : 0);
    for (int v = 0; v < kVectors; ++v) total[i][v] = set(start);
  }
  Products::template accumulate<R>(numbers, w.data, layout.block, total);
  for (int i = 0; i < R; ++i) {
    const Floats scale = set(reinterpret_cast<const QuantizedBlock*>(x[i] + at)->scale);
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (Products::kPaired) total[i][v] = subtract(total[i][v], w.pairs[v]);
      float* sum = out + i * kPanel + v * kLanes;
      store(sum, add(load(sum), multiply(to_floats(total[i][v]), multiply(load(w.scales + v * kLanes), scale))));
    }
  }
}

template <typename Products, int R>
void multiply_block_rows(const uint8_t* const* x, int64_t rows, int64_t at, const QuantizedLayout& layout, const WeightBlock& w,
                         float* out) {
  for (; rows >= R; rows -= R, x += R, out += R * kPanel) multiply_block<Products, R>(x, at, layout, w, out);
  if constexpr (R > 1) multiply_block_rows<Products, R - 1>(x, rows, at, layout, w, out);
}

template <typename Products>
void multiply_blocks(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t panel,
                     float* out) {
  const size_t block_bytes = weights.panel_bytes / static_cast<size_t>(weights.blocks);
  WeightBlock block{weights.data + static_cast<size_t>(panel) * weights.panel_bytes,
                    weights.scales + panel * weights.blocks * kPanel, {}};
  memset(out, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  for (int64_t b = 0; b < weights.blocks; ++b, block.data += block_bytes, block.scales += kPanel) {
    if constexpr (Products::kPaired) Products::own_pairs(block.data, weights.block, block.pairs);
    multiply_block_rows<Products, Products::kRows>(x, rows, b * layout.block_bytes, layout, block, out);
  }
}

struct Int4Products {
  static constexpr int32_t kZeroPoint = 8;
  static constexpr bool kWords = false, kPaired = false;
  static constexpr int kRows = kInt4Rows;

  template <int R>
  static void accumulate(const uint8_t* const* x, const uint8_t* w, int64_t block, Accumulators* total) {
    const int64_t step = block % 32 == 0 ? 32 : 16;  // columns that a Partial holds without overflow
    for (int64_t begin = 0; begin < block; begin += step) {
      Partial partial[R][kVectors];
      for (int i = 0; i < R; ++i) {
        for (int v = 0; v < kVectors; ++v) partial[i][v] = Partial{};
      }
      for (int64_t c = begin; c < begin + step; c += 8, w += kPanel * 4) {
        Ints low[kVectors], high[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const Ints bytes = load_ints(w + v * kLanes * 4);
          low[v] = low_nibbles(bytes);
          high[v] = high_nibbles(bytes);
        }
        for (int i = 0; i < R; ++i) {
          const Ints first = spread(x[i] + c), second = spread(x[i] + c + 4);
          for (int v = 0; v < kVectors; ++v) partial[i][v] = dot(dot(partial[i][v], low[v], first), high[v], second);
        }
      }
      for (int i = 0; i < R; ++i) {
        for (int v = 0; v < kVectors; ++v) total[i][v] = widen(total[i][v], partial[i][v]);
      }
    }
  }
};
