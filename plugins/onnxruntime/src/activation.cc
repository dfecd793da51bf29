#include "activation.h"

#include <algorithm>
#include <cmath>

#include "op.h"

namespace rq {
namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }
float gelu_tanh(float x) { return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

template <typename Function>
void each(int64_t n, float* out, Function function) {
  for (int64_t i = 0; i < n; ++i) out[i] = function(i);
}

}  // namespace

Activation activation_named(const std::string& name) {
  static const std::pair<const char*, Activation> names[] = {
      {"none", Activation::none},
      {"swiglu", Activation::swiglu},
      {"geglu", Activation::geglu},
      {"geglu_tanh", Activation::geglu_tanh},
      {"clamped_swiglu", Activation::clamped_swiglu},
      {"relu", Activation::relu},
      {"gelu", Activation::gelu},
  };
  for (const auto& [known, value] : names) {
    if (name == known) return value;
  }
  throw Error("unknown activation '" + name + "'");
}

bool gated(Activation activation) {
  return activation == Activation::swiglu || activation == Activation::geglu || activation == Activation::geglu_tanh ||
         activation == Activation::clamped_swiglu;
}

void activate(Activation activation, float alpha, float limit, const float* gate, const float* up, float* out, int64_t n) {
  switch (activation) {
    case Activation::none:
      return each(n, out, [=](int64_t i) { return gate[i]; });
    case Activation::swiglu:
      return each(n, out, [=](int64_t i) { return gate[i] * sigmoid(gate[i]) * up[i]; });
    case Activation::geglu:
      return each(n, out, [=](int64_t i) { return gelu(gate[i]) * up[i]; });
    case Activation::geglu_tanh:
      return each(n, out, [=](int64_t i) { return gelu_tanh(gate[i]) * up[i]; });
    case Activation::clamped_swiglu:
      // Comparisons are written so that NaN passes through, as in torch.clamp.
      return each(n, out, [=](int64_t i) {
        const float g = gate[i] > limit ? limit : gate[i];
        const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        return (u + 1.0f) * g * sigmoid(alpha * g);
      });
    case Activation::relu:
      return each(n, out, [=](int64_t i) { return gate[i] < 0.0f ? 0.0f : gate[i]; });
    case Activation::gelu:
      return each(n, out, [=](int64_t i) { return gelu(gate[i]); });
  }
}

}  // namespace rq
