#define RQ_DECODE decode_avx2
#include "decode_matrix.h"
