#include "processor.h"

#include <cstdlib>
#include <cstring>

namespace {

constexpr Code kPlain = {"plain",      round_tile_plain,   round_factors_plain, pack_tile_plain, multiply_tile_plain,
                         decode_plain, [] { return true; }};

#ifdef RQ_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

constexpr Code kVectorized[] = {
#ifdef RQ_X86
    {"avx512_vnni", round_tile_avx512_vnni, round_factors_avx512_vnni, pack_tile_avx512_vnni, multiply_tile_avx512_vnni,
     decode_avx512, [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }},
    {"avx512", round_tile_avx512, round_factors_avx512, pack_tile_avx512, multiply_tile_avx512, decode_avx512, has_avx512},
    {"avx2", round_tile_avx2, round_factors_avx2, pack_tile_avx2, multiply_tile_avx2, decode_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
};

// For tests, RQ_QUANTIZER_ISA chooses an instruction set other than the best.
const Code& choose() {
  const char* asked = std::getenv("RQ_QUANTIZER_ISA");
  for (const Code& code : kVectorized)
    if ((!asked || std::strcmp(asked, code.name) == 0) && code.supported()) return code;
  return kPlain;
}

}  // namespace

const Code& code_for_this_processor() {
  static const Code& code = choose();
  return code;
}
