#define RQ_DECODE decode_plain
#include "decode_matrix.h"
