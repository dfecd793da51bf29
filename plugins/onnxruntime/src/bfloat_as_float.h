// Without an instruction for products of bf16: rows of x rounded to bf16 are kept in fp32. Included by kernels_body.h.

void round_to_bfloat(const float* x, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; ++c) {
    const uint32_t bits = bfloat_bits(x[c]);
    memcpy(out + c, &bits, sizeof bits);
  }
}

void multiply_bfloats(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  multiply_panels<Storage::bf16>(x, rows, weights, first, count, out);
}
