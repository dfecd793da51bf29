// The ranks of an engine: one process each, which MPI connects.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace rq {

// All calls are collective unless they say otherwise, and throw an Error with MPI's reason. One thread at a time: hold `turn`.
class Ranks {
 public:
  // Starts MPI at the first call, which must be made by every rank.
  static Ranks& all();

  int rank() const { return rank_; }
  int size() const { return size_; }
  std::mutex& turn() { return turn_; }

  // everywhere[q * count + i] = mine[i] of rank q.
  void gather(const int32_t* mine, int count, int32_t* everywhere);
  // `everywhere` gets the bytes of rank 0, then those of rank 1, ..., and `sizes` their numbers; every rank may have another.
  void gather(const char* mine, size_t bytes, std::vector<char>& everywhere, std::vector<uint64_t>& sizes);
  int64_t largest(int64_t mine);

  // One message from every rank to every other that has rows for it. Rows of `columns` floats lie rank by rank in both arrays,
  // sent[q] for rank q and received[q] from it; empty messages and a rank's own rows are left to the caller.
  void exchange(const float* out, const int32_t* sent, float* in, const int32_t* received, int64_t columns);

  // Ends all ranks; not collective.
  [[noreturn]] void abort(int status);
  void finish();

 private:
  Ranks();
  void wait(std::vector<MPI_Request>& requests);

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
  bool started_here_ = false;
  std::mutex turn_;
  std::vector<MPI_Request> requests_;
};

}  // namespace rq
