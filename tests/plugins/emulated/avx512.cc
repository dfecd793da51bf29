// The kernels of AVX-512 and AMX on a processor without them, emulated: they check themselves. With an
// argument, the products of tiles are wrong, which the check has to find.
#include <immintrin.h>

#include "self_check.h"

bool tiles_agree_with_plain();

int main(int count, char**) {
  emulated::wrong_tiles = count > 1;
  rq::Kernels amx = rq::kAvx512Bf16Kernels;
  amx.multiply_bfloats = rq::multiply_bfloats_in_tiles;
  amx.multiply_quantized = rq::multiply_quantized_in_tiles;
  for (const rq::Kernels& set : {rq::kAvx512Kernels, rq::kAvx512VnniKernels, rq::kAvx512Bf16Kernels, amx}) {
    if (!rq::agrees_with_plain(set)) return 1;
  }
  return tiles_agree_with_plain() ? 0 : 1;
}
