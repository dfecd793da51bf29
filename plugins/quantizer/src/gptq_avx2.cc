#define RQ_ROUND_TILE round_tile_avx2
#define RQ_VECTOR_BYTES 32
#define RQ_VECTORS 2
#include "gptq_tile.h"
