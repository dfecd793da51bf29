// Any processor: 4 lanes in the compiler's vector extension.
#include <stdint.h>
#include <string.h>

namespace {

typedef float Vector __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int64_t kWidth = 4, kRows = 2, kColumns = 4;

inline Vector load(const float* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vector v) { memcpy(p, &v, sizeof v); }
inline Vector zero() { return Vector{0, 0, 0, 0}; }
inline Vector spread(float x) { return Vector{x, x, x, x}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline float sum(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }

inline float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24: zero and subnormals
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline Vector load_half(const uint16_t* p) { return Vector{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])}; }
inline Vector load_bfloat(const uint16_t* p) {
  const Bits bits = {uint32_t(p[0]) << 16, uint32_t(p[1]) << 16, uint32_t(p[2]) << 16, uint32_t(p[3]) << 16};
  Vector v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
// (q - zero point) * scale, rounded once, as one fma does.
inline Vector load_int8(const uint8_t* p, float scale) {
  return Vector{float(p[0] - 128), float(p[1] - 128), float(p[2] - 128), float(p[3] - 128)} * spread(scale);
}
inline Vector load_int4(const uint8_t* p, float scale) {
  return Vector{float((p[0] & 15) - 8), float((p[0] >> 4) - 8), float((p[1] & 15) - 8), float((p[1] >> 4) - 8)} * spread(scale);
}

}  // namespace

#define RQ_KERNELS kPlainKernels
#define RQ_KERNELS_NAME "plain"
#include "kernels_body.h"
