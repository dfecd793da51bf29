// The vector operations of 64-bit ARM (NEON, which every such processor has), 4 lanes, except for the products of int8. Included by
// the kernels files.
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace {

using Floats = float32x4_t;
using Ints = int32x4_t;
constexpr int64_t kLanes = 4, kVectors = 4;
constexpr int kFloatRows = 6;  // rows of x at a time: their sums take 24 of the 32 registers
constexpr int kUnpackingRows = 4;
constexpr int float_panels(int rows, bool) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
// No speed was measured on ARM, so prefetching is left to the processor.
template <int, int>
inline void prefetch(const uint8_t*) {}

inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats set(float x) { return vdupq_n_f32(x); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
// Lane i: the sum of v[i].
inline Floats sum_each(const Floats (&v)[kLanes]) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
inline Floats load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Floats load_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

inline Ints load_ints(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
inline Ints set(int32_t x) { return vdupq_n_s32(x); }
inline Ints spread(const uint8_t* four) {
  int32_t word;
  memcpy(&word, four, sizeof word);
  return set(word);
}
inline Floats to_floats(Ints v) { return vcvtq_f32_s32(v); }
// Moves byte j of each word to the top, followed by zeros.
inline Ints top_byte(Ints v, int j) {
  static constexpr uint8_t kPlaces[4][16] = {{255, 255, 255, 0, 255, 255, 255, 4, 255, 255, 255, 8, 255, 255, 255, 12},
                                             {255, 255, 255, 1, 255, 255, 255, 5, 255, 255, 255, 9, 255, 255, 255, 13},
                                             {255, 255, 255, 2, 255, 255, 255, 6, 255, 255, 255, 10, 255, 255, 255, 14},
                                             {255, 255, 255, 3, 255, 255, 255, 7, 255, 255, 255, 11, 255, 255, 255, 15}};
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(v), vld1q_u8(kPlaces[j])));
}
// The number in a table of 16 for each byte, which is its place.
inline Ints look_up(const int8_t (&table)[16], Ints places) {
  return vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(table), vreinterpretq_u8_s32(places)));
}
// 2^(e - 127) for kLanes bytes e; 0 instead of 2^-127.
inline Floats load_powers(const uint8_t* p) {
  uint32_t four;
  memcpy(&four, p, sizeof four);
  const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(wide)), 23));
}
// The numbers whose float8_e4m3fn codes are the top bytes. The bits of a code, moved to those of fp32, are 2^-120 times the number.
inline Floats from_e4m3(Ints top) {
  const Ints bits = vandq_s32(vshrq_n_s32(top, 4), vdupq_n_s32(static_cast<int32_t>(0x87f00000u)));
  return vmulq_n_f32(vreinterpretq_f32_s32(bits), 0x1p120f);
}
// Every byte n bits lower.
constexpr bool kShiftsBytes = true;
template <int n>
inline Ints shift_right(Ints v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), n)); }
// The numbers whose codes are `bits` bits (2 or 3) of each word, from bit `first` on: the codes less half of their range.
template <int bits>
inline Floats numbers_in(Ints words, int first) {
  const Ints top = vshlq_s32(words, vdupq_n_s32(32 - bits - first));
  return vcvtq_f32_s32(vshrq_n_s32(veorq_s32(top, vdupq_n_s32(INT32_MIN)), 32 - bits));
}

}  // namespace
