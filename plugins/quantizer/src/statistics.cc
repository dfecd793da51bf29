// Sums over weights, for the measurements of a calibration. Sums have as many lanes on every processor, so that they are the
// same there.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "threads.h"

#if defined(RQ_X86) && defined(__GLIBC__)
#define RQ_FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RQ_FOR_EVERY_PROCESSOR
#endif
#define RQ_EXPORTED extern "C" __attribute__((visibility("default")))

constexpr int64_t kLanes = 16;
// The bits of non-negative floats, read as integers, have the same order as the floats.
inline uint32_t bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

// Adds `lanes` squares, in double, because squares of very small and very large weights are outside of the range of float.
inline void add_squares(const float* some, const float* others, int64_t lanes, double* totals) {
  for (int64_t i = 0; i < lanes; ++i) {
    const double exact = others ? some[i] - others[i] : some[i];
    totals[i] += exact * exact;
  }
}

RQ_FOR_EVERY_PROCESSOR
double squared_difference(const float* some, const float* others, int64_t count) {
  double totals[kLanes] = {};
  int64_t c = 0;
  if (others)
    for (; c + kLanes <= count; c += kLanes) add_squares(some + c, others + c, kLanes, totals);
  else
    for (; c + kLanes <= count; c += kLanes) add_squares(some + c, nullptr, kLanes, totals);
  add_squares(some + c, others ? others + c : nullptr, count - c, totals);
  return std::accumulate(totals, totals + kLanes, 0.0);
}

// The float16 nearest to a float, ties to even, as a float; infinite beyond the range.
inline float nearest_half(float number) {
  constexpr float kSmallestNormal = 0x1p-14f, kBeyond = 65520.0f;
  const float magnitude = std::abs(number);
  const uint32_t whole = bits(magnitude), rounded = (whole + 0xfff + (whole >> 13 & 1)) & ~uint32_t{0x1fff};
  float normal;
  std::memcpy(&normal, &rounded, sizeof normal);
  // Steps of 2**-24, as floats from 0.5 to 1 have.
  const float subnormal = (magnitude + 0.5f) - 0.5f;
  const float finite = magnitude < kSmallestNormal ? subnormal : normal;
  return std::copysign(magnitude < kBeyond ? finite : std::numeric_limits<float>::infinity(), number);
}

RQ_FOR_EVERY_PROCESSOR
double squared_half_error(const float* weights, int64_t count) {
  double totals[kLanes] = {};
  float halves[kLanes];
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) halves[i] = nearest_half(weights[c + i]);
    add_squares(halves, weights + c, kLanes, totals);
  }
  for (int64_t i = 0; i < count - c; ++i) halves[i] = nearest_half(weights[c + i]);
  add_squares(halves, weights + c, count - c, totals);
  return std::accumulate(totals, totals + kLanes, 0.0);
}

// For the scores of a row: the number and the sum of those below `low`, and the number of those from `low` to `high`.
struct Lowest {
  int64_t below;
  double sum;
  int64_t between;
};

inline void add_lanes(const float* some, float* totals) {
  for (int64_t i = 0; i < kLanes; ++i) totals[i] += some[i];
}

// `between` has room for all scores.
RQ_FOR_EVERY_PROCESSOR
Lowest lowest(const float* weights, const float* norms, int64_t count, float low, float high, float* between) {
  constexpr int64_t kAtOnce = 512;
  const uint32_t from = bits(low), reach = bits(high) - from;
  int64_t below = 0, found = 0;
  // Several simple loops, because GCC vectorizes one loop for all sums with slow shuffles.
  float totals[kLanes] = {}, scores[kAtOnce], summed[kAtOnce];
  uint8_t near[kAtOnce];
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t some = std::min(kAtOnce, count - first);
    for (int64_t i = 0; i < some; ++i) scores[i] = std::abs(weights[first + i] * norms[first + i]);
    std::fill(scores + some, scores + kAtOnce, std::numeric_limits<float>::infinity());
    int32_t lower = 0;
    for (int64_t i = 0; i < kAtOnce; ++i) lower += scores[i] < low;
    below += lower;
    for (int64_t i = 0; i < kAtOnce; ++i) summed[i] = scores[i] < low ? scores[i] : 0.0f;
    for (int64_t c = 0; c < kAtOnce; c += kLanes) add_lanes(summed + c, totals);
    for (int64_t i = 0; i < kAtOnce; ++i) near[i] = bits(scores[i]) - from <= reach;
    std::fill(near + some, near + kAtOnce, uint8_t{0});
    for (int64_t c = 0; c < some; c += sizeof(uint64_t)) {
      uint64_t flags;
      for (std::memcpy(&flags, near + c, sizeof flags); flags; flags &= flags - 1)
        between[found++] = scores[c + __builtin_ctzll(flags) / 8];
    }
  }
  return {below, std::accumulate(totals, totals + kLanes, 0.0), found};
}

namespace {

template <typename OfRow>
void for_rows(int64_t rows, double* squares, int threads, const OfRow& of_row) {
  std::atomic<int64_t> next{0};
  on_threads(threads, rows, [&] {
    for (int64_t row; (row = next++) < rows;) squares[row] = of_row(row);
  });
}

}  // namespace

// `squares [rows]`: the sum of the squares of each row of `some [rows, columns]`, less `others` if that is not null.
RQ_EXPORTED void rq_squared_differences(const float* some, const float* others, int64_t rows, int64_t columns, double* squares,
                                        int threads) {
  for_rows(rows, squares, threads, [&](int64_t row) {
    return squared_difference(some + row * columns, others ? others + row * columns : nullptr, columns);
  });
}

// `squares [rows]`: the sum of the squared changes of each row of `weights [rows, columns]` in float16.
RQ_EXPORTED void rq_squared_half_errors(const float* weights, int64_t rows, int64_t columns, double* squares, int threads) {
  for_rows(rows, squares, threads, [&](int64_t row) { return squared_half_error(weights + row * columns, columns); });
}

// For the scores |weight| * norm of `weights [rows, columns]` and `norms [columns]`: the number and the sum of those below `low`.
// Returns the number of those from `low` to `high`; `between` has room for all scores.
RQ_EXPORTED int64_t rq_lowest_scores(const float* weights, const float* norms, int64_t rows, int64_t columns, float low,
                                     float high, float* between, int64_t* below, double* sum) {
  int64_t found = 0;
  *below = 0;
  *sum = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Lowest some = lowest(weights + row * columns, norms, columns, low, high, between + found);
    found += some.between;
    *below += some.below;
    *sum += some.sum;
  }
  return found;
}
