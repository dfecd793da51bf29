// The tiles of AMX, emulated by the description of their instructions in Intel's manual (volume 2, TDPBSUD and TDPBF16PS). What a
// processor answers with an exception ends the program.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {

// Takes the unsigned bytes for signed ones, which a check has to find.
inline bool wrong_tiles = false;

struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
struct Tile {
  uint8_t bytes[16][64];
};
inline TileShapes shapes = {};
inline Tile tiles[8];

inline void require(bool right) {
  if (!right) abort();
}

inline void load_config(const void* from) {
  memcpy(&shapes, from, sizeof shapes);
  require(shapes.palette == 1 && shapes.start_row == 0);
  for (const uint8_t byte : shapes.reserved) require(byte == 0);
  for (int t = 0; t < 16; ++t) {
    require(t < 8 ? shapes.row_bytes[t] <= 64 && shapes.rows[t] <= 16 : shapes.row_bytes[t] == 0 && shapes.rows[t] == 0);
  }
  memset(tiles, 0, sizeof tiles);
}
inline void release() { shapes = {}; }

inline void load_tile(int tile, const void* from, int64_t stride) {
  require(shapes.rows[tile] > 0);
  for (int r = 0; r < shapes.rows[tile]; ++r) {
    memcpy(tiles[tile].bytes[r], static_cast<const uint8_t*>(from) + r * stride, shapes.row_bytes[tile]);
  }
}
inline void store_tile(int tile, void* to, int64_t stride) {
  require(shapes.rows[tile] > 0);
  for (int r = 0; r < shapes.rows[tile]; ++r) {
    memcpy(static_cast<uint8_t*>(to) + r * stride, tiles[tile].bytes[r], shapes.row_bytes[tile]);
  }
}

// add(sum, the four bytes of a row of `a`, those of `b`) for every sum, in the order of the words of a row.
template <typename Sum, typename Add>
void add_products(int sums, int a, int b, Add add) {
  require(shapes.rows[a] == shapes.rows[sums] && shapes.row_bytes[b] == shapes.row_bytes[sums]);
  require(shapes.row_bytes[a] == 4 * shapes.rows[b] && sums != a && sums != b && a != b);
  for (int m = 0; m < shapes.rows[sums]; ++m) {
    for (int n = 0; n < shapes.row_bytes[sums] / 4; ++n) {
      Sum sum;
      memcpy(&sum, tiles[sums].bytes[m] + 4 * n, 4);
      sum = add(sum, shapes.rows[b], tiles[a].bytes[m], [&](int k) { return tiles[b].bytes[k] + 4 * n; });
      memcpy(tiles[sums].bytes[m] + 4 * n, &sum, 4);
    }
  }
}

// Signed bytes of `a`, unsigned ones of `b`.
inline void dot_bytes(int sums, int a, int b) {
  add_products<int32_t>(sums, a, b, [](int32_t sum, int words, const uint8_t* x, auto weights) {
    for (int i = 0; i < 4 * words; ++i) {
      const uint8_t weight = weights(i / 4)[i % 4];
      sum += static_cast<int8_t>(x[i]) * (wrong_tiles ? static_cast<int8_t>(weight) : weight);
    }
    return sum;
  });
}

inline float number_of(const uint8_t* bfloat) {
  float number;
  const uint8_t bytes[4] = {0, 0, bfloat[0], bfloat[1]};
  memcpy(&number, bytes, sizeof number);
  return number;
}
// The sums of even and of odd columns, which are added to each other at the end.
inline void dot_bfloats(int sums, int a, int b) {
  add_products<float>(sums, a, b, [](float sum, int words, const uint8_t* x, auto weights) {
    float even = 0, odd = 0;
    for (int k = 0; k < words; ++k) {
      even += number_of(x + 4 * k) * number_of(weights(k));
      odd += number_of(x + 4 * k + 2) * number_of(weights(k) + 2);
    }
    return sum + (even + odd);
  });
}

}  // namespace emulated

#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbsud emulated::dot_bytes
#define _tile_dpbf16ps emulated::dot_bfloats
