// Chooses the kernels for this processor.
#include "kernels.h"

#ifdef RQ_X86
#include <cpuid.h>
#endif
#if defined(RQ_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "self_check.h"

namespace rq {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

#ifdef RQ_X86
// Every processor with AVX2 has F16C; Clang 14 has a name for neither F16C nor AVX-VNNI.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

#ifdef RQ_ARM64
// The bits that Linux documents for AT_HWCAP and AT_HWCAP2; older headers do not define them all.
bool has_capability(unsigned long type, int bit) {
#ifdef __linux__
  return (getauxval(type) >> bit & 1) != 0;
#else
  return (void)type, (void)bit, false;
#endif
}
bool has_dotprod() { return has_capability(16, 20); }                // AT_HWCAP, ASIMDDP
bool has_i8mm() { return has_dotprod() && has_capability(26, 13); }  // AT_HWCAP2, I8MM
#endif

const Candidate kCandidates[] = {
#ifdef RQ_X86
    {&kAvx512Bf16Kernels, [] { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }},
    {&kAvx512VnniKernels, has_avx512_vnni},
    {&kAvx512Kernels, has_avx512},
    {&kAvxVnniKernels, has_avx_vnni},
    {&kAvx2Kernels, has_avx2},
#endif
#ifdef RQ_ARM64
    {&kNeonI8mmKernels, has_i8mm},
    {&kNeonDotprodKernels, has_dotprod},
    {&kNeonKernels, [] { return true; }},
#endif
    {&kPlainKernels, [] { return true; }},
};

const Kernels& choose() {
  const char* asked = std::getenv("RQ_MOE_ISA");
  const bool any = !asked || !*asked;
  std::string found;
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.supported()) continue;
    const char* name = candidate.kernels->name;
    if (any || std::strcmp(asked, name) == 0) {
      if (agrees_with_plain(*candidate.kernels)) return *candidate.kernels;
      std::fprintf(stderr, "librq_moe.so: the %s kernels fail their self-check on this processor and are not used\n", name);
    } else {
      found += found.empty() ? name : std::string(", ") + name;
    }
  }
  throw std::runtime_error(std::string("RQ_MOE_ISA is '") + asked +
                           "', which is not one of the instruction sets that run here: " + found +
                           "; unset it to use the first of them");
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
