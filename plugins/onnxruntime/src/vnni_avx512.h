// AVX-512 with VNNI: one instruction sums four products of an unsigned and a signed byte. Included by the kernels files.
#include "vectors_avx512.h"

namespace {

constexpr int32_t kInt8Offset = 128;
constexpr int kQuantizedRows = 8;
constexpr int kDotInstructions = 1;
constexpr int quantized_panels(int, int instructions) { return instructions == 1 ? 1 : 2; }

using Partial = Ints;
constexpr int kPartialColumns = 1024;  // of any block
#ifdef __AVX512VNNI__
// Around the intrinsic, GCC 12 moves every sum to another register and back.
inline Ints dot_int8(Ints sum, Ints weights, Ints x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
}
#else  // emulated
inline Ints dot_int8(Ints sum, Ints weights, Ints x) { return _mm512_dpbusd_epi32(sum, weights, x); }
#endif
inline Ints dot_int4(Ints sum, Ints weights, Ints x) { return dot_int8(sum, weights, x); }

}  // namespace
