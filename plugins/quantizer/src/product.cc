// Distributes the tiles of a product over threads.
#include <atomic>
#include <cstdlib>

#include "processor.h"
#include "threads.h"

// Returns 0 on success, and 2 if there is not enough memory for the inputs.
extern "C" __attribute__((visibility("default"))) int rq_multiply_rounded(const Product* product, int threads) {
  const Code& code = code_for_this_processor();
  const int64_t tiles = (product->tokens + kTileTokens - 1) / kTileTokens;
  const int64_t groups = (product->rows + kProductRows - 1) / kProductRows;
  const int64_t pairs = product->blocks * product->block / 2 * kTileTokens, units = product->blocks * kTileTokens;
  if (tiles == 0) return 0;
  uint32_t* memory = static_cast<uint32_t*>(std::aligned_alloc(64, sizeof(uint32_t) * tiles * (pairs + units)));
  if (!memory) return 2;
  const auto tile = [&](int64_t number) {
    uint32_t* begin = memory + number * (pairs + units);
    return Tile16{begin, reinterpret_cast<float*>(begin + pairs)};
  };
  std::atomic<int64_t> packed{0}, multiplied{0};
  on_threads(threads, tiles, [&] {
    for (int64_t t; (t = packed++) < tiles;) code.pack_tile(*product, t * kTileTokens, tile(t));
  });
  on_threads(threads, groups, [&] {
    for (int64_t group; (group = multiplied++) < groups;)
      for (int64_t t = 0; t < tiles; ++t) code.multiply_tile(*product, group * kProductRows, t * kTileTokens, tile(t));
  });
  std::free(memory);
  return 0;
}
