// GPTQ (Frantar et al., arXiv 2210.17323) of one matrix. A row of weights is rounded for itself, column after column, so rows
// are the lanes of vectors and the work of threads, and no result depends on how many there are of either.
#pragma once

#include <cstdint>

// Columns come in parts of `known` columns, which are rounded with a look at each other, and parts in blocks of `block` columns,
// which share a scale in every row. Columns beyond `columns` are zeros.
struct Matrix {
  const float* weights;  // [rows, columns]
  int64_t rows, columns, parts, known, block;
  // What is rounded away of column j is taken out, times feedback, of column k > j. In the same block of columns:
  // [parts * known / block, block, block], for each j all k. In later blocks of the part: [parts, known / block,
  // block / kColumns, known / 2, kColumns], for each k that of two neighbouring columns j and j + 1 in bf16, of j in the lower half.
  const float* within;
  const uint32_t* across;
  const float* importance;  // [parts * known]: how much a squared error of the column counts in the choice of scales
  const float* fractions;   // [fraction_count]: the scales to try, relative to the one that just holds the largest weight
  int64_t fraction_count;
  int32_t least, greatest;  // of a whole number
  int8_t* q;                // [rows, parts * known], or null
  float* scales;            // [rows, parts * known / block]
  float* values;            // [rows, columns]: q * scale, or null
  double* changes;          // [rows]: with `values`, the sum of (value - weight)**2 is added
};

// Columns that a product computes at a time; divides every block.
constexpr int kColumns = 4;

// Rows that are rounded together; their weights take 256 bytes a column and stay in the cache of a core.
constexpr int64_t kTileRows = 64;

// Rounds the rows from `row` on, `kTileRows` of them or those that are left. `tile` has room for kTileRows * parts * known
// floats, aligned to 64 bytes. False where a weight is not finite.
using RoundTile = bool (*)(const Matrix& matrix, int64_t row, float* tile);

bool round_tile_plain(const Matrix& matrix, int64_t row, float* tile);
#ifdef RQ_X86
bool round_tile_avx2(const Matrix& matrix, int64_t row, float* tile);
bool round_tile_avx512(const Matrix& matrix, int64_t row, float* tile);
bool round_tile_avx512_bf16(const Matrix& matrix, int64_t row, float* tile);
#endif
