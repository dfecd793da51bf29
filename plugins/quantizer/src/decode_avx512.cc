#define RQ_DECODE decode_avx512
#include "decode_matrix.h"
