// Distributes tiles of rows over threads.
#include <atomic>
#include <cstdlib>

#include "processor.h"
#include "threads.h"

// Returns 0 on success, 1 if a weight is not finite, and 2 if there is not enough memory for the tiles.
extern "C" __attribute__((visibility("default"))) int rq_gptq(const Matrix* matrix, int threads) {
  const RoundTile round_tile = code_for_this_processor().round_tile;
  const int64_t tiles = (matrix->rows + kTileRows - 1) / kTileRows;
  std::atomic<int64_t> next{0};
  std::atomic<int> status{0};
  const auto work = [&] {
    float* memory = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * tile_floats(*matrix)));
    if (!memory) status = 2;
    for (int64_t tile; status == 0 && (tile = next++) < tiles;)
      if (!round_tile(*matrix, tile * kTileRows, memory)) status = 1;
    std::free(memory);
  };
  on_threads(threads, tiles, work);
  return status;
}
