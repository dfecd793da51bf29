// The gate-weighted sum of rows. A product is rounded before it is added, so that all instruction sets give the same bits.
// Included by kernels_body.h.

void combine(const float* const* rows, const float* gates, int64_t count, int64_t n, float* out) {
  constexpr int64_t kColumns = 64, kParts = kColumns / kLanes;  // whose sums fit into registers
  int64_t i = 0;
  for (; i + kColumns <= n; i += kColumns) {
    Floats sum[kParts];
    for (int64_t p = 0; p < kParts; ++p) sum[p] = set(0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const Floats gate = set(gates[r]);
      for (int64_t p = 0; p < kParts; ++p) sum[p] = add(sum[p], multiply(gate, load(rows[r] + i + p * kLanes)));
    }
    for (int64_t p = 0; p < kParts; ++p) store(out + i + p * kLanes, sum[p]);
  }
  for (; i < n; ++i) {
    float sum = 0.0f;
    for (int64_t r = 0; r < count; ++r) sum += gates[r] * rows[r][i];
    out[i] = sum;
  }
}
