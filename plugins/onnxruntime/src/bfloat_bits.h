// Rounds to bf16. Plain C++, so that all instruction sets round in the same way. Included by the files that need it.

// The bits of the nearest number that fits into bf16, ties to even, in their upper half. NaN stays NaN.
inline uint32_t bfloat_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = bits + 0x7fffu + (bits >> 16 & 1u), nan = bits | 0x00400000u;
  return ((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest) & 0xffff0000u;
}
