#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace rq {

const Kernels& best_kernels() {
#ifdef RQ_X86
  const char* asked = std::getenv("RQ_MOE_ISA");
  const auto allows = [&](const char* name) { return !asked || std::strcmp(asked, name) == 0; };
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512Kernels;
  }
  if (allows("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2Kernels;
#endif
  return kPlainKernels;
}

}  // namespace rq
