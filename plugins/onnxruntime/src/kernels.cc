// Chooses the kernels for this processor.
#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "self_check.h"

namespace rq {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

const Candidate kCandidates[] = {
#ifdef RQ_X86
    {&kAvx512VnniKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
     }},
    {&kAvx512Kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
     }},
    // Every processor with AVX2 has F16C, which Clang 14 has no name for.
    {&kAvx2Kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&kPlainKernels, [] { return true; }},
};

const Kernels& choose() {
  const char* asked = std::getenv("RQ_MOE_ISA");
  for (const Candidate& candidate : kCandidates) {
    if (asked && std::strcmp(asked, candidate.kernels->name) != 0) continue;
    if (!candidate.supported()) continue;
    if (agrees_with_plain(*candidate.kernels)) return *candidate.kernels;
    std::fprintf(stderr, "librq_moe.so: the %s kernels fail their self-check on this processor and are not used\n",
                 candidate.kernels->name);
  }
  return kPlainKernels;
}

}  // namespace

QuantizedLayout quantized_layout(int64_t block, int64_t blocks) {
  const int64_t block_bytes = static_cast<int64_t>(sizeof(QuantizedBlock)) + block;
  return {block, blocks, block_bytes, blocks * block_bytes};
}

const Kernels& best_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace rq
