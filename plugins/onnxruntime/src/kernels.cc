// Chooses the kernels for this processor.
#include "kernels.h"

#ifdef RQ_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(RQ_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernel_sets.h"
#include "self_check.h"

namespace rq {
namespace {

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
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
// The processor has tiles and products of bf16 and int8, and Linux lets this process use them: it must be asked, once.
bool has_amx() {
#ifdef __linux__
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmx) == kAmx &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
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

struct Candidate {
  Kernels kernels;
  bool (*supported)();
};

Kernels choose() {
  const Candidate candidates[] = {
#ifdef RQ_X86
      {amx_kernels(), has_amx},
      {avx512bf16_kernels(), has_avx512_bf16},
      {avx512vnni_kernels(), has_avx512_vnni},
      {kAvx512Kernels, has_avx512},
      {avxvnni_kernels(), has_avx_vnni},
      {kAvx2Kernels, has_avx2},
#endif
#ifdef RQ_ARM64
      {neon_i8mm_kernels(), has_i8mm},
      {neon_dotprod_kernels(), has_dotprod},
      {kNeonKernels, [] { return true; }},
#endif
      {kPlainKernels, [] { return true; }},
  };
  const char* asked = std::getenv("RQ_MOE_ISA");
  const bool any = !asked || !*asked;
  std::string found;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported()) continue;
    const char* name = candidate.kernels.name;
    if (any || std::strcmp(asked, name) == 0) {
      if (agrees_with_plain(candidate.kernels)) return candidate.kernels;
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
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace rq
