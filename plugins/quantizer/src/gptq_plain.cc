#define RQ_ROUND_TILE round_tile_plain
#define RQ_VECTOR_BYTES 16
#define RQ_VECTORS 2
#include "gptq_tile.h"
