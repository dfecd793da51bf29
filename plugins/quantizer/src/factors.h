// Rounds the factors for later blocks, which every row of weights has in common, to the integers of gptq.h.
#pragma once

#include <cstdint>

struct Factors {
  // [parts, known, known]: what is subtracted from a later column (second) for the rounding error of a column (first).
  const float* factors;
  const float* balance;  // [parts, known], see gptq.h
  int64_t parts, known, block;
  uint8_t* across;  // as in gptq.h. Only the factors for later blocks are written.
  float* units;     // as in gptq.h, likewise
};

// Rounds the factors of the columns of one block as GPTQ rounds weights: the factors for later columns compensate for what
// rounding changes. `memory` has room for factor_floats, aligned to 64 bytes.
using RoundFactors = void (*)(const Factors& factors, int64_t part, int64_t block, float* memory);

// The vectors of a tile may be wider than a block.
constexpr int64_t kMostLanes = 64;

inline int64_t factor_floats(const Factors& factors) {
  return factors.known * ((factors.block + kMostLanes - 1) / kMostLanes * kMostLanes);
}

void round_factors_plain(const Factors& factors, int64_t part, int64_t block, float* memory);
#ifdef RQ_X86
void round_factors_avx2(const Factors& factors, int64_t part, int64_t block, float* memory);
void round_factors_avx512(const Factors& factors, int64_t part, int64_t block, float* memory);
void round_factors_avx512_vnni(const Factors& factors, int64_t part, int64_t block, float* memory);
#endif
