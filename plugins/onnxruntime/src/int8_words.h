// int8 weights times 16-bit words of x: 255 * 127 * 2 does not fit the 16 bits that AVX2 and AVX-512 sum products of bytes in.
// Included by kernels_body.h.
//
// With several rows two products are had for the price of one (S. Winograd, "A New Algorithm for Inner Product", IEEE
// Transactions on Computers, 1968): the sum of (x0 + w1) * (x1 + w0) over pairs of columns is their dot product, plus the sums
// of x0 * x1, which belongs to x alone, and of w0 * w1, which belongs to the weights alone. Multiplications fill one port of an
// AVX2 core, additions find room on others. The numbers are whole, so the result is the same to the bit.

template <bool paired>
struct Int8Products {
  static constexpr int32_t kZeroPoint = 128;
  static constexpr bool kWords = true, kPaired = paired;
  static constexpr int kRows = kInt8Rows;

  template <int R>
  static void accumulate(const uint8_t* const* x, const uint8_t* w, int64_t block, Accumulators* total) {
    for (int64_t c = 0; c < block; c += 4, w += kPanel * 4) {
      Ints even[kVectors], odd[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const Ints bytes = load_ints(w + v * kLanes * 4);
        even[v] = even_bytes(bytes);
        odd[v] = odd_bytes(bytes);
      }
      for (int i = 0; i < R; ++i) {
        const Ints first = spread(x[i] + 2 * c), second = spread(x[i] + 2 * c + 4);
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (paired) {
            total[i][v] = dot_words(total[i][v], add_words(first, odd[v]), add_words(second, even[v]));
          } else {
            total[i][v] = dot_words(dot_words(total[i][v], first, even[v]), second, odd[v]);
          }
        }
      }
    }
  }

  static void own_pairs(const uint8_t* w, int64_t block, Accumulators& total) {
    for (int v = 0; v < kVectors; ++v) total[v] = set(0);
    for (int64_t c = 0; c < block; c += 4, w += kPanel * 4) {
      for (int v = 0; v < kVectors; ++v) {
        const Ints bytes = load_ints(w + v * kLanes * 4);
        total[v] = dot_words(total[v], even_bytes(bytes), odd_bytes(bytes));
      }
    }
  }
};

constexpr bool kInt8Words = true;
constexpr int64_t kPairedRows = 4;  // from here on own_pairs is worth its cost

void multiply_int8(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t panel,
                   float* out) {
  if (rows < kPairedRows) return multiply_blocks<Int8Products<false>>(x, rows, layout, weights, panel, out);
  multiply_blocks<Int8Products<true>>(x, rows, layout, weights, panel, out);
}
