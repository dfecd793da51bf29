// The AVX-512 kernels on a processor without it, emulated: they check themselves.
#include "self_check.h"

int main() {
  const bool agree = rq::agrees_with_plain(rq::kAvx512Kernels);
  const bool with_vnni_agree = rq::agrees_with_plain(rq::kAvx512VnniKernels);
  const bool with_bf16_agree = rq::agrees_with_plain(rq::kAvx512Bf16Kernels);
  return agree && with_vnni_agree && with_bf16_agree ? 0 : 1;
}
