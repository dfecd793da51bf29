// int8 weights times bytes of x, where one instruction does it (or where there is none). Included by kernels_body.h.

struct Int8Products {
  static constexpr int32_t kZeroPoint = 128;
  static constexpr bool kWords = false, kPaired = false;
  static constexpr int kRows = kInt8Rows;

  template <int R>
  static void accumulate(const uint8_t* const* x, const uint8_t* w, int64_t block, Accumulators* total) {
    for (int64_t c = 0; c < block; c += 4, w += kPanel * 4) {
      Ints weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = load_ints(w + v * kLanes * 4);
      for (int i = 0; i < R; ++i) {
        const Ints value = spread(x[i] + c);
        for (int v = 0; v < kVectors; ++v) total[i][v] = dot_bytes(total[i][v], weights[v], value);
      }
    }
  }
};

constexpr bool kInt8Words = false;

void multiply_int8(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights, int64_t panel,
                   float* out) {
  multiply_blocks<Int8Products>(x, rows, layout, weights, panel, out);
}
