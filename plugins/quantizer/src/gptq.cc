// Chooses the code for this processor and shares tiles of rows among threads.
#include "gptq.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Candidate {
  const char* name;
  RoundTile round_tile;
  bool (*supported)();
};

const Candidate kCandidates[] = {
#ifdef RQ_X86
    {"avx512", round_tile_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
     }},
    {"avx2", round_tile_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"plain", round_tile_plain, [] { return true; }},
};

// RQ_QUANTIZER_ISA, for tests, chooses another one than the best.
RoundTile choose() {
  const char* asked = std::getenv("RQ_QUANTIZER_ISA");
  for (const Candidate& candidate : kCandidates)
    if ((!asked || std::strcmp(asked, candidate.name) == 0) && candidate.supported()) return candidate.round_tile;
  return round_tile_plain;
}

}  // namespace

// 0; 1 where a weight is not finite; 2 where there is no memory for the tiles.
extern "C" __attribute__((visibility("default"))) int rq_gptq(const Matrix* matrix, int threads) {
  static const RoundTile round_tile = choose();
  const int64_t tiles = (matrix->rows + kTileRows - 1) / kTileRows;
  std::atomic<int64_t> next{0};
  std::atomic<int> status{0};
  const auto work = [&] {
    const size_t bytes = sizeof(float) * kTileRows * matrix->parts * matrix->known;
    float* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!memory) status = 2;
    for (int64_t tile; status == 0 && (tile = next++) < tiles;)
      if (!round_tile(*matrix, tile * kTileRows, memory)) status = 1;
    std::free(memory);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, tiles); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return status;
}
