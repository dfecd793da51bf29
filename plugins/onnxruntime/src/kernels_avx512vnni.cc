// AVX-512 with VNNI.
#include "vnni_avx512.h"

#define RQ_KERNELS kAvx512VnniKernels
#define RQ_KERNELS_NAME "avx512vnni"
#include "kernels_body.h"
