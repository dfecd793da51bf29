#define RQ_ROUND_TILE round_tile_plain
#define RQ_ROUND_FACTORS round_factors_plain
#define RQ_PACK_TILE pack_tile_plain
#define RQ_MULTIPLY_TILE multiply_tile_plain
#define RQ_VECTOR_BYTES 16
#define RQ_VECTORS 2
#define RQ_QUAD_COLUMNS 2
#ifdef __SSE2__
#include <emmintrin.h>
#define RQ_ADD_PRODUCTS(sum, pairs, factors) ((sum) + (Whole)_mm_madd_epi16((__m128i)(pairs), _mm_set1_epi32(factors)))
#endif
#include "factors_tile.h"
#include "gptq_tile.h"
#include "product_tile.h"
