// The kernels of AVX-512 and AMX on a processor without them, emulated: they check themselves. With an
// argument, the products of tiles are wrong, which the check has to find.
#include <immintrin.h>

#include "kernel_sets.h"
#include "self_check.h"

bool tiles_agree_with_plain();

int main(int count, char**) {
  emulated::wrong_tiles = count > 1;
  for (const rq::Kernels& set : {rq::kAvx512Kernels, rq::avx512vnni_kernels(), rq::avx512bf16_kernels(), rq::amx_kernels()}) {
    if (!rq::agrees_with_plain(set)) return 1;
  }
  return tiles_agree_with_plain() ? 0 : 1;
}
