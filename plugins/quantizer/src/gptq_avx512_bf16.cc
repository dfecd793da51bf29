#define RQ_ROUND_TILE round_tile_avx512_bf16
#define RQ_VECTOR_BYTES 64
#define RQ_VECTORS 4
#define RQ_BF16_PRODUCTS
#include "gptq_tile.h"
