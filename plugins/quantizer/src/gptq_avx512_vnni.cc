#define RQ_ROUND_TILE round_tile_avx512_vnni
#define RQ_VECTOR_BYTES 64
#define RQ_VECTORS 4
#include "gptq_tile.h"
