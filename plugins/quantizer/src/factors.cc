// Distributes the blocks of factors over threads.
#include "factors.h"

#include <atomic>
#include <cstdlib>

#include "processor.h"
#include "threads.h"

// Returns 0 on success, and 2 if there is not enough memory.
extern "C" __attribute__((visibility("default"))) int rq_round_factors(const Factors* factors, int threads) {
  const RoundFactors round_factors = code_for_this_processor().round_factors;
  // The first blocks have the most later ones, and are taken first.
  const int64_t blocks = factors->known / factors->block, tiles = blocks * factors->parts;
  std::atomic<int64_t> next{0};
  std::atomic<int> status{0};
  on_threads(threads, tiles, [&] {
    float* memory = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * factor_floats(*factors)));
    if (!memory) status = 2;
    for (int64_t tile; status == 0 && (tile = next++) < tiles;)
      round_factors(*factors, tile % factors->parts, tile / factors->parts, memory);
    std::free(memory);
  });
  return status;
}
