// Context::parallel with a runtime whose threads are real: prints the message of what the tiles throw.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <new>
#include <thread>
#include <vector>

#include "op.h"

namespace {

OrtStatus* input_count(const OrtKernelContext*, size_t* count) {
  *count = 0;
  return nullptr;
}

OrtStatus* parallel_for(const OrtKernelContext*, void (*work)(void*, size_t), size_t tiles, size_t, void* user) {
  std::vector<std::thread> threads;
  for (size_t tile = 0; tile < tiles; ++tile) threads.emplace_back(work, user, tile);
  for (std::thread& thread : threads) thread.join();
  return nullptr;
}

OrtStatus* print(int, const char* message) {
  std::cout << message << "\n";
  return nullptr;
}

}  // namespace

// Arguments: how many tiles there are, the one that throws ("all" throw), and what: "error", "memory" or "number".
int main(int, char** argument) {
  void* table[275] = {};
  table[0] = reinterpret_cast<void*>(print);
  table[88] = reinterpret_cast<void*>(input_count);
  table[274] = reinterpret_cast<void*>(parallel_for);
  const rq::Api api(reinterpret_cast<const OrtApi*>(table));
  const size_t tiles = std::stoul(argument[1]);
  const bool all = std::strcmp(argument[2], "all") == 0;
  const size_t bad = all ? 0 : std::stoul(argument[2]);
  std::atomic<size_t> ran{0};
  rq::guarded(api, "Test", [&] {
    auto work = [&](size_t tile) {
      ++ran;
      if (!all && tile != bad) return;
      if (std::strcmp(argument[3], "memory") == 0) throw std::bad_alloc();
      if (std::strcmp(argument[3], "number") == 0) throw 7;
      throw rq::Error(all ? "a tile is wrong" : "tile " + std::to_string(tile) + " is wrong");
    };
    rq::Context(api, nullptr).parallel(tiles, work);
    std::cout << "no error\n";
  });
  return ran == tiles ? 0 : 1;
}
