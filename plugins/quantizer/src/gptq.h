// GPTQ (Frantar et al., arXiv 2210.17323) of one matrix. Each row of weights is rounded independently, one column after another.
// Rows are the lanes of vectors and are shared among threads, so no result depends on the number of lanes or threads.
#pragma once

#include <cstdint>

// The columns form parts of `known` columns; the errors of a column are compensated only in its part. A part consists of blocks
// of `block` columns, which share a scale in every row. Columns beyond `columns` are zeros.
struct Matrix {
  const float* weights;  // [rows, columns]
  int64_t rows, columns, parts, known, block;
  // The rounding error of column j times a factor is subtracted from each later column k. Factors within a block of columns:
  // [parts * known / block, block, block], indexed by j and k. Factors for later blocks of the part: [parts, known / block,
  // known / block, block / 4, block / 4, 4], indexed by the block of k, that of j, and the columns in them. Each entry holds the
  // factors of columns j to j + 3 plus kFactorOffset as uint8, j in the lowest, in the unit of k for the block of j: [parts,
  // known / block, known / block, block], indexed by the block of k, that of j, and k.
  const float* within;
  const uint32_t* across;
  const float* units;
  // [parts * known]: what the errors of each column are multiplied with before they become integers. The factors across blocks are
  // divided by it.
  const float* balance;
  const float* importance;  // [parts * known]: the weight of each column's squared error in the choice of scales
  const float* fractions;   // [fraction_count]: the scales to try, as fractions of the scale that just holds the largest weight
  int64_t fraction_count;
  int32_t least, greatest;  // the range of rounded weights
  int8_t* q;                // [rows, parts * known], or null
  float* scales;            // [rows, parts * known / block]
  float* values;            // [rows, columns]: q * scale, or null
  double* changes;          // [rows]: the sum of (value - weight)**2 is added, or null
};

constexpr int64_t kLargestBlock = 128;
// Integers that stand for errors and factors go up to these. The sum of four products of factors plus kFactorOffset fits into int16,
// and is exact.
constexpr int32_t kGreatestError = 127;
constexpr int32_t kGreatestFactor = 31;
constexpr int32_t kFactorOffset = 32;
static_assert(4 * (kGreatestFactor + kFactorOffset) * kGreatestError <= INT16_MAX, "a sum of products fits");

// The number of rows that are rounded together. Their weights take 256 bytes per column and stay in the cache of a core.
constexpr int64_t kTileRows = 64;

// Floats of a tile: its weights, and the units and sums of the errors of each block of a part.
inline int64_t tile_floats(const Matrix& matrix) {
  return kTileRows * (matrix.parts * matrix.known + 2 * (matrix.known / matrix.block));
}

// Rounds up to kTileRows rows, from `row` on. `tile` has room for tile_floats, aligned to 64 bytes. Returns false if a weight is
// not finite.
using RoundTile = bool (*)(const Matrix& matrix, int64_t row, float* tile);

bool round_tile_plain(const Matrix& matrix, int64_t row, float* tile);
#ifdef RQ_X86
bool round_tile_avx2(const Matrix& matrix, int64_t row, float* tile);
bool round_tile_avx512(const Matrix& matrix, int64_t row, float* tile);
bool round_tile_avx512_vnni(const Matrix& matrix, int64_t row, float* tile);
#endif
