// Which columns of the cache a row of queries reads.
#pragma once

#include <cstring>
#include <vector>

#include "op.h"

namespace rq {

// Columns from begin up to, but not including, end.
struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// A row of the mask. It reads from its first true column to its last one, and not all between them if it has holes.
struct MaskRow {
  const uint8_t* read;
  Range columns;
  bool holes;

  bool empty() const { return columns.begin == columns.end; }
  bool covers(const Range& range) const { return !holes && columns.begin <= range.begin && range.end <= columns.end; }
  bool meets(const Range& range) const { return columns.begin < range.end && range.begin < columns.end; }
};

// Appends the runs of true bytes in `range`.
inline void append_runs(const uint8_t* read, const Range& range, std::vector<Range>& runs) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!read[i]) continue;
    int64_t end = i + 1;
    while (end < range.end && read[end]) ++end;
    runs.push_back({i, end});
    i = end;
  }
}

// The mask [sequences or 1, 1, steps or 1, total].
class Mask {
 public:
  explicit Mask(const Tensor& mask) : steps_(mask.dim(2)), total_(mask.dim(3)) {
    const int64_t sequences = mask.dim(0);
    rows_.reserve(static_cast<size_t>(sequences * steps_));
    for (int64_t i = 0; i < sequences * steps_; ++i) rows_.push_back(row(mask.as<uint8_t>() + i * total_));
    of_sequence_ = sequences == 1 ? 0 : steps_;
  }

  const MaskRow& operator()(int64_t sequence, int64_t step) const {
    return rows_[static_cast<size_t>(sequence * of_sequence_ + (steps_ == 1 ? 0 : step))];
  }

 private:
  MaskRow row(const uint8_t* read) const {
    const auto eight_are_false = [](const uint8_t* bytes) {
      uint64_t word;
      std::memcpy(&word, bytes, sizeof word);
      return word == 0;
    };
    int64_t begin = 0, end = total_;
    while (begin + 8 <= end && eight_are_false(read + begin)) begin += 8;
    while (begin < end && !read[begin]) ++begin;
    while (end - 8 >= begin && eight_are_false(read + end - 8)) end -= 8;
    while (end > begin && !read[end - 1]) --end;
    return {read, {begin, end}, end > begin && std::memchr(read + begin, 0, static_cast<size_t>(end - begin)) != nullptr};
  }

  int64_t steps_, total_, of_sequence_ = 0;
  std::vector<MaskRow> rows_;
};

}  // namespace rq
