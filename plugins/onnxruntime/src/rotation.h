// Rotary position embeddings: of each head, the first half is rotated against the second, by an angle for each of its numbers.
#pragma once

#include <algorithm>

#include "op.h"

namespace rq {

struct Rotation {
  const float *cos, *sin;  // [tokens, half]
  int64_t half;

  // Rotates the heads of one token.
  void operator()(int64_t token, int64_t heads, const float* in, float* out) const {
    const float *c = cos + token * half, *s = sin + token * half;
    for (int64_t h = 0; h < heads; ++h, in += 2 * half, out += 2 * half) {
      for (int64_t i = 0; i < half; ++i) {
        out[i] = in[i] * c[i] - in[half + i] * s[i];
        out[half + i] = in[half + i] * c[i] + in[i] * s[i];
      }
    }
  }
};

inline void require_angles(const char* name, const Tensor& angles, int64_t tokens, int64_t width) {
  require(angles.present, "input ", name, " is missing");
  require(angles.type == kFloat && angles.dim(0) == tokens && 2 * angles.dim(1) == width, name, " is not fp32 [", tokens, ", ",
          width, " / 2], for each token and half of a head");
}

}  // namespace rq
