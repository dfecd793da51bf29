// Rows of x rounded to bf16 times panels of bf16 weights. An instruction multiplies two neighbouring columns at once (dot_pair).
// A line of a panel has one column after the other, so it is first rearranged to pairs of columns (paired). If there are more
// rows than fit into registers, the first of them leave the pairs in a buffer for the others. Included by kernels_body.h.

constexpr int64_t kPairBytes = kPanel * 4;              // of two columns of a panel: a line
constexpr int64_t kPairsAtOnce = 128;                   // in the buffer
using PairBuffer = uint8_t[kPairsAtOnce * kPairBytes];  // of one panel, 8 KiB

// In place of two numbers of fp32, out has two of bf16.
void round_to_bfloat(const float* x, int64_t columns, float* out) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
  for (int64_t c = 0; c < columns; ++c) {
    const uint16_t top = static_cast<uint16_t>(bfloat_bits(x[c]) >> 16);
    memcpy(bytes + c * 2, &top, sizeof top);
  }
  if (columns % 2 != 0) memset(bytes + columns * 2, 0, 2);
}

// `count` pairs of columns of P panels, `stride` bytes apart, and of the rows of x, which start at x[i] + begin.
struct Pairs {
  int64_t begin, count;
  const uint8_t* weights;
  int64_t stride;
};

enum class Lines { stored, kept, paired };  // of a panel; of a panel, and left in the buffer; from the buffer

// Adds R rows times P panels to out[row][16] of each panel, which are `out_stride` apart.
template <Lines lines, int R, int P>
RQ_OWN_REGISTERS void multiply_pairs(const float* const* x, const Pairs& pairs, int64_t out_stride, float* out,
                                     PairBuffer* buffer) {
  Floats sum[R][P];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[i][p] = load(out + p * out_stride + i * kPanel);
  }
  const uint8_t* line = lines == Lines::paired ? buffer[0] : pairs.weights;
  const int64_t stride = lines == Lines::paired ? sizeof buffer[0] : pairs.stride;
  for (int64_t c = 0; c < pairs.count; ++c, line += kPairBytes) {
    Ints weights[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      weights[p] = load_ints(line + p * stride);
      if (lines == Lines::paired) continue;
      prefetch<P, R>(line + p * stride);
      weights[p] = paired(weights[p]);
      if (lines == Lines::kept) store(buffer[p] + c * kPairBytes, weights[p]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Ints two = spread(reinterpret_cast<const uint8_t*>(x[i] + pairs.begin + c));
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[i][p] = dot_pair(sum[i][p], weights[p], two);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store(out + p * out_stride + i * kPanel, sum[i][p]);
  }
}

// All rows times P panels: panel `first`, and further panels at distances of `apart`.
template <int R, int P>
void multiply_paired_panels(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t apart,
                            float* out) {
  const int64_t panel_bytes = static_cast<int64_t>(weights.panel_bytes), out_stride = apart * rows * kPanel;
  const int64_t complete = weights.columns / 2;  // pairs
  const uint8_t* data = weights.data + first * panel_bytes;
  Pairs pairs{0, complete, data, apart * panel_bytes};
  for (int p = 0; p < P; ++p) memset(out + p * out_stride, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  const Parts<R> parts(rows);
  alignas(64) PairBuffer buffer[P];
  if (rows <= R) {
    multiply_pairs<Lines::stored, R, P>(x, pairs, out_stride, out, buffer);
    pairs.begin = complete;
  }
  for (; pairs.begin < complete; pairs.begin += pairs.count) {
    pairs.weights = data + pairs.begin * kPairBytes;
    pairs.count = complete - pairs.begin < kPairsAtOnce ? complete - pairs.begin : kPairsAtOnce;
    parts.each([&](auto count, int64_t row) {
      constexpr auto multiply_first = multiply_pairs<Lines::kept, count, P>, multiply = multiply_pairs<Lines::paired, count, P>;
      (row == 0 ? multiply_first : multiply)(x + row, pairs, out_stride, out + row * kPanel, buffer);
    });
  }
  if (weights.columns % 2 != 0) {  // the last column has no neighbour
    for (int p = 0; p < P; ++p) {
      uint8_t last[kPairBytes] = {};
      memcpy(last, data + complete * kPairBytes + p * pairs.stride, kPairBytes / 2);
      store(buffer[p], paired(load_ints(last)));
    }
    pairs.count = 1;
    parts.each([&](auto count, int64_t row) {
      multiply_pairs<Lines::paired, count, P>(x + row, pairs, out_stride, out + row * kPanel, buffer);
    });
  }
}

void multiply_bfloats(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  with_rows<kFloatRows>(rows, [&](auto R) {
    in_stretches<bfloat_panels(R)>(count, [&](auto P, int64_t panel, int64_t apart) {
      multiply_paired_panels<R, P>(x, rows, weights, first + panel, apart, out + panel * rows * kPanel);
    });
  });
}
