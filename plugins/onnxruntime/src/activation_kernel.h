// Activations in plain C++, which the compiler vectorizes; all instruction sets round in the same way. Included by
// kernels_body.h.

// e^x for x from -87 to 88, accurate to two units in the last place: 2^n times the Taylor series of the rest, at most ln(2) / 2. NaN
// stays NaN.
inline float exponential_within(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
  const float whole = shifted - 12582912.0f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln(2) in two parts
  const float square = r * r;
  const float fourth = (1.0f / 24.0f + r * (1.0f / 120.0f)) + square * (1.0f / 720.0f + r * (1.0f / 5040.0f));
  const float series = (1.0f + r) + square * ((0.5f + r * (1.0f / 6.0f)) + square * fourth);
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits - 0x4b400000 + 127) << 23);
  float power;
  memcpy(&power, &bits, sizeof power);
  return series * power;
}
inline float exponential(float x) {
  x = 88.0f < x ? 88.0f : x;
  return exponential_within(-87.0f > x ? -87.0f : x);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
inline float gelu(float x) { return 0.5f * x * (1.0f + __builtin_erff(x * 0.70710678f)); }
// 0.5 * (1 + tanh(y)) is sigmoid(2 * y).
inline float gelu_tanh(float x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

void activate(Activation activation, float alpha, float limit, const float* up, float* gate, int64_t n) {
  switch (activation) {
    case Activation::none: return;
    case Activation::swiglu:
      for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
      return;
    case Activation::geglu:
      for (int64_t i = 0; i < n; ++i) gate[i] = gelu(gate[i]) * up[i];
      return;
    case Activation::geglu_tanh:
      for (int64_t i = 0; i < n; ++i) gate[i] = gelu_tanh(gate[i]) * up[i];
      return;
    case Activation::clamped_swiglu:
      // The comparisons are written such that NaN stays NaN, as in torch.clamp.
      for (int64_t i = 0; i < n; ++i) {
        const float g = gate[i] > limit ? limit : gate[i];
        const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        gate[i] = (u + 1.0f) * g * sigmoid(alpha * g);
      }
      return;
    case Activation::limited_swiglu:
      for (int64_t i = 0; i < n; ++i) {
        const float g = gate[i] > limit ? limit : gate[i];
        const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        gate[i] = g * sigmoid(g) * u;
      }
      return;
    case Activation::relu:
      for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i];
      return;
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i) gate[i] = gelu(gate[i]);
      return;
    case Activation::relu2:
      for (int64_t i = 0; i < n; ++i) {
        const float x = gate[i] < 0.0f ? 0.0f : gate[i];
        gate[i] = x * x;
      }
      return;
  }
}
