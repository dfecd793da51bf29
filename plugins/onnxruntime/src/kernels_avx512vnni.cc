// AVX-512 with VNNI.
#include "vnni_avx512.h"

#include "quantized_body.h"

const rq::QuantizedProducts rq::kAvx512VnniQuantized = multiply_quantized;
