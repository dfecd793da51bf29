// The activations that ExpertGemm can fuse.
#pragma once

#include <cstdint>
#include <string>

namespace rq {

enum class Activation { none, swiglu, geglu, geglu_tanh, clamped_swiglu, relu, gelu };

Activation activation_named(const std::string& name);  // throws Error on an unknown name
bool gated(Activation activation);

// out[i] = activation(gate[i], up[i]) for i < n; an activation that is not gated reads `gate` alone.
void activate(Activation activation, float alpha, float limit, const float* gate, const float* up, float* out, int64_t n);

}  // namespace rq
