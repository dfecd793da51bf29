// Products of small matrices for sets that have an instruction for them (RQ_MATRIX_PRODUCTS). Such a set also defines
// multiply_matrices, pair_of_rows, zip_low, zip_high, even_words and odd_words. Included by quantized_kernel.h.

// The k-th and the following eight columns of a group (of two groups of int8), up to `fours` times four columns.
template <Storage storage, int k, int fours, int pairs>
__attribute__((always_inline)) inline void add_matrices(const uint8_t* const* x, int64_t c, const uint8_t* group,
                                                        Ints (&sum)[pairs][kVectors][2]) {
  Ints rows[pairs];
  for (int i = 0; i < pairs; ++i) rows[i] = pair_of_rows(x[2 * i] + c + 4 * k, x[2 * i + 1] + c + 4 * k);
  for (int v = 0; v < kVectors; ++v) {
    Ints lines[lines_of(storage) + 1];  // and that of the second group
    constexpr int count = static_cast<int>(words_of(4 * fours, bits_of(storage)));
    for (int i = 0; i < count; ++i) lines[i] = load_ints(group + (i * kPanel + v * kLanes) * 4);
    const Ints first = numbers_at<storage, k>(lines);
    const Ints second = fours_of(storage) == 1 ? lines[1] : numbers_at<storage, k + 1>(lines);
    const Ints low = zip_low(first, second), high = zip_high(first, second);
    for (int i = 0; i < pairs; ++i) {
      sum[i][v][0] = multiply_matrices(sum[i][v][0], low, rows[i]);
      sum[i][v][1] = multiply_matrices(sum[i][v][1], high, rows[i]);
    }
  }
  if constexpr (k + 2 < fours) add_matrices<storage, k + 2, fours>(x, c, group, sum);
}

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
  constexpr int64_t groups = fours_of(storage) == 1 ? 2 : 1, step = groups * columns_of(storage);  // at least 8 columns
  const uint8_t* group = block.weights;
  int64_t c = 0;
  for (; c + step <= columns; c += step, group += groups * bytes_of(storage)) {
    add_matrices<storage, 0, groups * fours_of(storage)>(x, c, group, sum);
  }
  if (storage == Storage::int3 && c < columns) add_matrices<storage, 0, fours_of(storage) / 2>(x, c, group, sum);
  for (int i = 0; i < R / 2; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      total[2 * i][0][v] = even_words(sum[i][v][0], sum[i][v][1]);
      total[2 * i + 1][0][v] = odd_words(sum[i][v][0], sum[i][v][1]);
    }
  }
}
