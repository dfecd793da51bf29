// The sets of kernels that differ from a simpler set in some products only. They are put together at run time, because a file
// that is compiled for an instruction set must not run anything on processors without it.
#pragma once

#include "kernels.h"

namespace rq {

inline Kernels with_quantized(Kernels set, const char* name, QuantizedProducts products) {
  set.name = name;
  set.multiply_quantized = products;
  return set;
}

inline Kernels avxvnni_kernels() { return with_quantized(kAvx2Kernels, "avxvnni", kAvxVnniQuantized); }
inline Kernels avx512vnni_kernels() { return with_quantized(kAvx512Kernels, "avx512vnni", kAvx512VnniQuantized); }
inline Kernels avx512bf16_kernels() {
  Kernels set = with_quantized(kAvx512Kernels, "avx512bf16", kAvx512VnniQuantized);
  set.multiply_bfloats = kAvx512Bf16Bfloats;
  set.round_to_bfloat = kAvx512Bf16Round;
  return set;
}
inline Kernels amx_kernels() {
  Kernels set = with_quantized(avx512bf16_kernels(), "amx", kAmxQuantized);
  set.multiply_bfloats = kAmxBfloats;
  return set;
}

inline Kernels neon_dotprod_kernels() { return with_quantized(kNeonKernels, "neon_dotprod", kNeonDotprodQuantized); }
inline Kernels neon_i8mm_kernels() { return with_quantized(kNeonKernels, "neon_i8mm", kNeonI8mmQuantized); }

}  // namespace rq
