// Sums over weights, for the measurements of a calibration. Vectors have one width, so that sums are the same on every processor.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "threads.h"

#if defined(RQ_X86) && defined(__GLIBC__)
#define RQ_FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RQ_FOR_EVERY_PROCESSOR
#endif
#define RQ_EXPORTED extern "C" __attribute__((visibility("default")))

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Wholes __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));

template <typename Vector>
inline double sum(const Vector& lanes) {
  double total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// Loads up to kLanes values; the remaining lanes are `filling`.
inline Floats load(const float* values, int64_t count, float filling = 0) {
  Floats lanes;
  if (count < kLanes) lanes = filling - Floats{};
  std::memcpy(&lanes, values, 4 * (count < kLanes ? count : kLanes));
  return lanes;
}

// In double, because squares of very small and very large weights are outside of the range of float.
RQ_FOR_EVERY_PROCESSOR
double squared_difference(const float* some, const float* others, int64_t count) {
  Doubles total = {};
  for (int64_t c = 0; c < count; c += kLanes) {
    Floats difference = load(some + c, count - c);
    if (others) difference -= load(others + c, count - c);
    const Doubles exact = __builtin_convertvector(difference, Doubles);
    total += exact * exact;
  }
  return sum(total);
}

// For the scores of a row: the number and the sum of those below `low`, and the number of those from `low` to `high`.
struct Lowest {
  int64_t below;
  double sum;
  int64_t between;
};

// The bits of non-negative floats, read as integers, have the same order as the floats.
inline uint32_t bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

// `between` has room for all scores.
RQ_FOR_EVERY_PROCESSOR
Lowest lowest(const float* weights, const float* norms, int64_t count, float low, float high, float* between) {
  constexpr int64_t kAtOnce = 512;
  const uint32_t from = bits(low), reach = bits(high) - from;
  Wholes below = {};
  Floats total = {};
  int64_t found = 0;
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t last = std::min(first + kAtOnce, count);
    Floats scores[kAtOnce / kLanes];
    for (int64_t c = first; c < last; c += kLanes) {
      Floats some = load(weights + c, last - c, std::numeric_limits<float>::infinity()) * load(norms + c, last - c, 1);
      some = reinterpret_cast<Floats>(reinterpret_cast<Wholes>(some) & std::numeric_limits<int32_t>::max());
      const Wholes lower = some < low;
      below -= lower;
      total += lower ? some : Floats{};
      scores[(c - first) / kLanes] = some;
    }
    const float* each = reinterpret_cast<const float*>(scores);
    for (int64_t i = 0; i < last - first; ++i) {
      between[found] = each[i];
      found += bits(each[i]) - from <= reach;
    }
  }
  return {static_cast<int64_t>(sum(below)), sum(total), found};
}

// `squares [rows]`: the sum of the squares of each row of `some [rows, columns]`, less `others` if that is not null.
RQ_EXPORTED void rq_squared_differences(const float* some, const float* others, int64_t rows, int64_t columns, double* squares,
                                        int threads) {
  std::atomic<int64_t> next{0};
  on_threads(threads, rows, [&] {
    for (int64_t row; (row = next++) < rows;)
      squares[row] = squared_difference(some + row * columns, others ? others + row * columns : nullptr, columns);
  });
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
