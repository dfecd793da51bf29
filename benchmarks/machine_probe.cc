// What this machine can do at most: read bandwidth, and multiply-adds per second of the instructions that the kernels use,
// with operands in registers. Compiled with -march=native by machine.py.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

double seconds_of(int threads, const std::function<void(int)>& work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Four places in turn, 64 bytes from each: on some processors one place alone leaves half of a core's memory requests unused.
// Unrolled, because instructions count: so many of them are in flight.
constexpr size_t kPlaces = 4, kPlace = 44 << 10, kPlacesBytes = kPlaces * kPlace;

// One place after the other, which other processors prefetch better.
void read_in_order(const uint8_t* data, size_t bytes) {
  __m256i sum[8] = {};
  for (size_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j) {
      sum[j] = _mm256_xor_si256(sum[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
    }
  }
  for (const __m256i& one : sum) asm volatile("" ::"x"(one));
}

void read(const uint8_t* data, size_t bytes) {
  __m256i sum[2 * kPlaces] = {};
  for (const uint8_t* const end = data + bytes; data < end; data += kPlacesBytes) {
    for (size_t i = 0; i < kPlace; i += 64) {
#pragma GCC unroll 8
      for (size_t j = 0; j < 2 * kPlaces; ++j) {
        const uint8_t* half = data + j / 2 * kPlace + i + j % 2 * 32;
        sum[j] = _mm256_xor_si256(sum[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(half)));
      }
    }
  }
  for (const __m256i& one : sum) asm volatile("" ::"x"(one));
}

constexpr int kChains = 12;
constexpr int64_t kReadBytes = int64_t{256} << 20, kParts = 8;  // more than every cache holds, each part more than most

struct Nothing {
  template <typename Value>
  Value operator()(Value value) const {
    return value;
  }
};

// Twelve independent chains of `step`, which does `macs` multiply-adds, and after every eighth `widen`; returns multiply-adds.
template <typename Value, typename Step, typename Widen = Nothing>
double chains(double macs, Value start, Step step, Widen widen = {}) {
  const int64_t steps = static_cast<int64_t>(1e7 / macs) / 8 * 8;
  Value value[kChains];
#pragma GCC unroll 12
  for (int j = 0; j < kChains; ++j) value[j] = start;
  for (int64_t i = 0; i < steps; i += 8) {
    for (int k = 0; k < 8; ++k) {
#pragma GCC unroll 12
      for (int j = 0; j < kChains; ++j) {
        value[j] = step(value[j]);
        asm volatile("" : "+x"(value[j]));  // so that the chains, which are alike, stay apart
      }
    }
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) value[j] = widen(value[j]);
  }
  return macs * kChains * static_cast<double>(steps);
}

double fp32_macs() {
#ifdef __AVX512F__
  const __m512 x = _mm512_set1_ps(0.5f);
  return chains(16, x, [=](__m512 sum) { return _mm512_fmadd_ps(x, x, sum); });
#else
  const __m256 x = _mm256_set1_ps(0.5f);
  return chains(8, x, [=](__m256 sum) { return _mm256_fmadd_ps(x, x, sum); });
#endif
}

#ifdef __AVX512BF16__
double bf16_macs() {
  const __m512i x = _mm512_set1_epi16(0x3f00);
  const auto step = [=](__m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(x));
  };
  return chains(32, _mm512_setzero_ps(), step);
}
#else
double bf16_macs() { return fp32_macs(); }
#endif

#ifdef __AVX512VNNI__
double int8_macs() {
  const __m512i x = _mm512_set1_epi8(3);
  return chains(64, x, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, x, x); });
}
double int4_macs() { return int8_macs(); }
#else
// int8 products need 16 bits each: sixteen at once. int4 times int8 fits: thirty-two at once, widened after every eighth.
double int8_macs() {
  const __m256i x = _mm256_set1_epi16(3);
  return chains(16, x, [](__m256i sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(sum, sum)); });
}
double int4_macs() {
  const __m256i x = _mm256_set1_epi8(1);
  const auto step = [=](__m256i sum) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, sum)); };
  return chains(32, x, step, [=](__m256i sum) { return _mm256_madd_epi16(sum, x); });
}
#endif

}  // namespace

extern "C" {

// Bytes per second of one pass over the next part of memory, which is as short as what is compared with it, in the better order.
double read_bandwidth(int threads) {
  static const uint8_t* const data = [] {
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(size_t{2} << 20, kReadBytes));
    madvise(memory, kReadBytes, MADV_HUGEPAGE);
    std::memset(memory, 1, kReadBytes);
    return memory;
  }();
  static int64_t next = 0;
  const size_t share = kReadBytes / kParts / threads / kPlacesBytes * kPlacesBytes;
  double best = 0;
  for (auto* one : {read, read_in_order}) {
    const uint8_t* const part = data + next++ % kParts * (kReadBytes / kParts);
    best = std::max(best, share * threads / seconds_of(threads, [=](int thread) { one(part + share * thread, share); }));
  }
  return best;
}

// Multiply-adds per second; kind 0: fp32, 1: bf16 (fp32 if there is no instruction for it), 2: int8 times int8, 3: int4 times
// int8.
double peak(int kind, int threads) {
  double (*const macs)() = std::array{fp32_macs, bf16_macs, int8_macs, int4_macs}[kind];
  std::vector<double> done(threads);
  const double seconds = seconds_of(threads, [&](int thread) { done[thread] = macs(); });
  double total = 0;
  for (double one : done) total += one;
  return total / seconds;
}
}
