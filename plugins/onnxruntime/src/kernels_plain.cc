// Any processor: 4 lanes in the compiler's vector extension.
#include <stdint.h>
#include <string.h>

namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4, kVectors = 4;
constexpr int kFloatRows = 2, kUnpackingRows = 2, kQuantizedRows = 2;
constexpr int float_panels(int rows, bool) { return rows == 1 ? 2 : 1; }
constexpr int kDotInstructions = 1;  // does not matter: see prefetch
constexpr int quantized_panels(int, int) { return 1; }
template <int, int>
inline void prefetch(const uint8_t* line) {
  __builtin_prefetch(line + 4096);
}
constexpr int32_t kInt8Offset = 128;
inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
inline Floats set(float x) { return Floats{x, x, x, x}; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Ints add(Ints a, Ints b) { return a + b; }
inline Floats multiply(Floats a, Floats b) { return a * b; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

// Lane i: the sum of v[i].
inline Floats sum_each(const Floats (&v)[kLanes]) {
  Floats sums{};
  for (int i = 0; i < kLanes; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  return sums;
}

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
inline Floats load_half(const uint16_t* p) { return Floats{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])}; }
inline Floats load_bfloat(const uint16_t* p) {
  const uint32_t bits[4] = {uint32_t(p[0]) << 16, uint32_t(p[1]) << 16, uint32_t(p[2]) << 16, uint32_t(p[3]) << 16};
  Floats v;
  memcpy(&v, bits, sizeof v);
  return v;
}

inline Ints load_ints(const uint8_t* p) {
  Ints v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Ints set(int32_t x) { return Ints{x, x, x, x}; }
inline Ints spread(const uint8_t* four) {
  int32_t word;
  memcpy(&word, four, sizeof word);
  return set(word);
}
inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
inline Ints top_byte(Ints v, int j) { return (v << (24 - 8 * j)) & static_cast<int32_t>(0xff000000u); }
inline Ints look_up(const int8_t (&table)[16], Ints places) {
  uint8_t bytes[16];
  memcpy(bytes, &places, sizeof bytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(table[byte]);
  memcpy(&places, bytes, sizeof bytes);
  return places;
}
// 2^(e - 127) for kLanes bytes e; 0 instead of 2^-127.
inline Floats load_powers(const uint8_t* p) {
  const uint32_t bits[4] = {uint32_t(p[0]) << 23, uint32_t(p[1]) << 23, uint32_t(p[2]) << 23, uint32_t(p[3]) << 23};
  Floats v;
  memcpy(&v, bits, sizeof v);
  return v;
}
// The numbers whose float8_e4m3fn codes are the top bytes; lower bytes may be anything. The bits of a code, moved to those of
// fp32, are 2^-120 times the number, with a subnormal one for a subnormal one.
inline Floats from_e4m3(Ints top) {
  const Ints bits = (top >> 4) & static_cast<int32_t>(0x87f00000u);
  Floats v;
  memcpy(&v, &bits, sizeof v);
  return v * 0x1p120f;
}
// Every byte n bits lower; its upper bits may be those of the next byte.
constexpr bool kShiftsBytes = false;
template <int n>
inline Ints shift_right(Ints v) { return v >> n; }
// The numbers whose codes are `bits` bits (2 or 3) of each word, from bit `first` on: the codes less half of their range.
template <int bits>
inline Floats numbers_in(Ints words, int first) {
  return to_floats(((words << (32 - bits - first)) ^ INT32_MIN) >> (32 - bits));
}

using Partial = Ints;
constexpr int kPartialColumns = 1024;  // of any block
inline Ints dot_int8(Ints sum, Ints weights, Ints x) {
  int8_t signed_bytes[16];
  uint8_t bytes[16];
  memcpy(bytes, &weights, sizeof bytes);
  memcpy(signed_bytes, &x, sizeof signed_bytes);
  for (int lane = 0; lane < 4; ++lane) {
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum[lane] += bytes[i] * signed_bytes[i];
  }
  return sum;
}
inline Ints dot_int4(Ints sum, Ints weights, Ints x) { return dot_int8(sum, weights, x); }

}  // namespace

#define RQ_KERNELS kPlainKernels
#define RQ_KERNELS_NAME "plain"
#include "kernels_body.h"
