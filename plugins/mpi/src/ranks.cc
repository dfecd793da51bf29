#include "ranks.h"

#include <sched.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>

#include "op.h"

namespace rq {
namespace {

constexpr int kRowsTag = 1;

void check(int code, const char* what) {
  if (code == MPI_SUCCESS) return;
  char reason[MPI_MAX_ERROR_STRING] = "unknown";
  int length = 0;
  MPI_Error_string(code, reason, &length);
  throw Error(std::string(what) + " failed, because another rank ended or cannot be reached: " + reason);
}

}  // namespace

Ranks& Ranks::all() {
  static Ranks ranks;
  return ranks;
}

Ranks::Ranks() {
  int started = 0, provided = MPI_THREAD_SINGLE;
  check(MPI_Initialized(&started), "MPI_Initialized");
  if (started) {
    check(MPI_Query_thread(&provided), "MPI_Query_thread");
  } else {
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
    started_here_ = true;
  }
  require(provided >= MPI_THREAD_SERIALIZED, "this MPI lets only one thread call it, and a session may run on any");
  check(MPI_Comm_dup(MPI_COMM_WORLD, &comm_), "MPI_Comm_dup");
  check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
  check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
}

// MPI's own waiting keeps a core busy, which ranks that share one then lack.
void Ranks::wait(std::vector<MPI_Request>& requests) {
  for (int done = 0; !done;) {
    check(MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE), "waiting for a rank");
    if (!done) sched_yield();
  }
  requests.clear();
}

void Ranks::gather(const int32_t* mine, int count, int32_t* everywhere) {
  check(MPI_Iallgather(mine, count, MPI_INT32_T, everywhere, count, MPI_INT32_T, comm_, &requests_.emplace_back()), "counting");
  wait(requests_);
}

void Ranks::gather(const char* mine, size_t bytes, std::vector<char>& everywhere, std::vector<uint64_t>& sizes) {
  require(bytes <= INT32_MAX, bytes, " bytes are more than a message of MPI holds");
  const uint64_t own = bytes;
  sizes.resize(size_);
  check(MPI_Iallgather(&own, 1, MPI_UINT64_T, sizes.data(), 1, MPI_UINT64_T, comm_, &requests_.emplace_back()), "gathering");
  wait(requests_);
  const uint64_t total = std::accumulate(sizes.begin(), sizes.end(), uint64_t{0});
  require(total <= INT32_MAX, total, " bytes are more than MPI gathers at once");
  std::vector<int> counts(sizes.begin(), sizes.end()), starts(size_);
  std::exclusive_scan(counts.begin(), counts.end(), starts.begin(), 0);
  everywhere.resize(total);
  check(MPI_Iallgatherv(mine, static_cast<int>(bytes), MPI_BYTE, everywhere.data(), counts.data(), starts.data(), MPI_BYTE, comm_,
                        &requests_.emplace_back()),
        "gathering");
  wait(requests_);
}

int64_t Ranks::largest(int64_t mine) {
  int64_t all = mine;
  check(MPI_Iallreduce(&mine, &all, 1, MPI_INT64_T, MPI_MAX, comm_, &requests_.emplace_back()), "agreeing on a step");
  wait(requests_);
  return all;
}

void Ranks::exchange(const float* out, const int32_t* sent, float* in, const int32_t* received, int64_t columns) {
  MPI_Datatype row;  // counts of rows fit an int where those of bytes do not
  check(MPI_Type_contiguous(static_cast<int>(columns), MPI_FLOAT, &row), "MPI_Type_contiguous");
  check(MPI_Type_commit(&row), "MPI_Type_commit");
  for (int q = 0; q < size_; ++q) {
    if (q != rank_ && received[q]) {
      check(MPI_Irecv(in, received[q], row, q, kRowsTag, comm_, &requests_.emplace_back()), "receiving rows");
    }
    in += received[q] * columns;
  }
  for (int q = 0; q < size_; ++q) {
    if (q != rank_ && sent[q]) check(MPI_Isend(out, sent[q], row, q, kRowsTag, comm_, &requests_.emplace_back()), "sending rows");
    out += sent[q] * columns;
  }
  wait(requests_);
  check(MPI_Type_free(&row), "MPI_Type_free");
}

void Ranks::abort(int status) {
  MPI_Abort(MPI_COMM_WORLD, status);
  std::_Exit(status);
}

void Ranks::finish() {
  int finished = 0;
  MPI_Finalized(&finished);
  if (started_here_ && !finished) MPI_Finalize();
}

}  // namespace rq

// What a program needs beside the ops, without a binding of MPI. Functions return 0, or 1 with a sentence in `error`.
namespace {

constexpr size_t kErrorSize = 512;

template <typename Work>
int guarded(char* error, Work&& work) noexcept {
  try {
    rq::Ranks& ranks = rq::Ranks::all();
    const std::lock_guard<std::mutex> turn(ranks.turn());
    work(ranks);
    return 0;
  } catch (const std::exception& failure) { std::snprintf(error, kErrorSize, "%s", failure.what()); } catch (...) {
    std::snprintf(error, kErrorSize, "unknown failure");
  }
  return 1;
}

}  // namespace

#define RQ_EXPORTED extern "C" __attribute__((visibility("default")))

RQ_EXPORTED int rq_ranks_start(int32_t* rank, int32_t* size, char* error) {
  return guarded(error, [&](rq::Ranks& ranks) {
    *rank = ranks.rank();
    *size = ranks.size();
  });
}

RQ_EXPORTED int rq_ranks_largest(int64_t mine, int64_t* all, char* error) {
  return guarded(error, [&](rq::Ranks& ranks) { *all = ranks.largest(mine); });
}

// Calls take(data, sizes, user) with the bytes of all ranks, one after the other, and uint64 [ranks].
RQ_EXPORTED int rq_ranks_gather(const char* mine, uint64_t bytes, void (*take)(const char*, const uint64_t*), char* error) {
  return guarded(error, [&](rq::Ranks& ranks) {
    std::vector<char> everywhere;
    std::vector<uint64_t> sizes;
    ranks.gather(mine, bytes, everywhere, sizes);
    take(everywhere.data(), sizes.data());
  });
}

RQ_EXPORTED void rq_ranks_abort(int status) { rq::Ranks::all().abort(status); }

RQ_EXPORTED void rq_ranks_finish() { rq::Ranks::all().finish(); }
