// Work that several threads share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

// Calls `work` on each of `threads` threads, but at most on one for each of the `parts` that they take from a common counter.
template <typename Work>
void on_threads(int64_t threads, int64_t parts, const Work& work) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, parts); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}
