// Products of inputs with a rounded matrix, as sums of int16 products: exact but for the rounding of the inputs to 16 bits, in a
// unit of their own for every token and block, and that of the sums over blocks in fp32.
#pragma once

#include <cstdint>

struct Product {
  const float* inputs;  // [columns, tokens]
  int64_t tokens, columns;
  // Weights are q * scale; columns beyond `columns` have no inputs.
  const int8_t* q;      // [rows, blocks, block]
  const float* scales;  // [rows, blocks]
  int64_t rows, blocks, block;
  float* outputs;  // [rows, tokens]
};

// Tokens are the lanes of vectors, and are packed in tiles of so many.
constexpr int64_t kTileTokens = 64;
// The number of rows that are multiplied at a time.
constexpr int64_t kProductRows = 64;

// A tile: inputs as pairs of neighbouring columns, int16, the first in the lower half, [blocks * block / 2, kTileTokens]; and
// their units [blocks, kTileTokens].
struct Tile16 {
  uint32_t* pairs;
  float* units;
};

// Packs the tile with `tokens` from `token` on.
using PackTile = void (*)(const Product& product, int64_t token, Tile16 tile);
// Computes the outputs of up to kProductRows rows, from `row` on, for the tile with `tokens` from `token` on.
using MultiplyTile = void (*)(const Product& product, int64_t row, int64_t token, Tile16 tile);

#define RQ_DECLARE_PRODUCT(isa)                                             \
  void pack_tile_##isa(const Product& product, int64_t token, Tile16 tile); \
  void multiply_tile_##isa(const Product& product, int64_t row, int64_t token, Tile16 tile);
RQ_DECLARE_PRODUCT(plain)
#ifdef RQ_X86
RQ_DECLARE_PRODUCT(avx2)
RQ_DECLARE_PRODUCT(avx512)
RQ_DECLARE_PRODUCT(avx512_vnni)
#endif
