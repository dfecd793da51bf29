// Products of small matrices for sets that have an instruction for them (RQ_MATRIX_PRODUCTS). Such a set also defines
// multiply_matrices, pair_of_rows, zip_low, zip_high, even_words and odd_words. Included by quantized_kernel.h.

// For an even number of rows: rows 2i and 2i + 1 of x share two sums per vector of weights. Zipped, the words of these sums are
// those of weight rows 0, 0, 1, 1 and 2, 2, 3, 3, for the two rows of x in turn.
template <Storage storage, int R, int P>
__attribute__((always_inline)) inline void add_matrix_products(const uint8_t* const* x, const PanelBlock& block, int64_t columns,
                                                               Ints (&total)[R][P][kVectors]) {
  static_assert(R % 2 == 0 && P == 1);
  Ints sum[R / 2][kVectors][2];
  for (int i = 0; i < R / 2; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v][0] = zip_low(total[2 * i][0][v], total[2 * i + 1][0][v]);
      sum[i][v][1] = zip_high(total[2 * i][0][v], total[2 * i + 1][0][v]);
    }
  }
  constexpr int64_t kLines = storage == Storage::int8 ? 2 : 1;  // that hold 8 columns
  const uint8_t* line = block.weights;
  for (int64_t c = 0; c < columns; c += 8, line += kLines * kPanel * 4) {
    Ints rows[R / 2];
    for (int i = 0; i < R / 2; ++i) rows[i] = pair_of_rows(x[2 * i] + c, x[2 * i + 1] + c);
    for (int v = 0; v < kVectors; ++v) {
      const uint8_t* words = line + v * kLanes * 4;
      const Ints bytes = load_ints(words);
      const Ints first = storage == Storage::int8 ? bytes : numbers_of<storage>(low_nibbles(bytes));
      const Ints second = storage == Storage::int8 ? load_ints(words + kPanel * 4) : numbers_of<storage>(high_nibbles(bytes));
      const Ints low = zip_low(first, second), high = zip_high(first, second);
      for (int i = 0; i < R / 2; ++i) {
        sum[i][v][0] = multiply_matrices(sum[i][v][0], low, rows[i]);
        sum[i][v][1] = multiply_matrices(sum[i][v][1], high, rows[i]);
      }
    }
  }
  for (int i = 0; i < R / 2; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      total[2 * i][0][v] = even_words(sum[i][v][0], sum[i][v][1]);
      total[2 * i + 1][0][v] = odd_words(sum[i][v][0], sum[i][v][1]);
    }
  }
}
