#include <immintrin.h>
#define RQ_ROUND_TILE round_tile_avx2
#define RQ_PACK_TILE pack_tile_avx2
#define RQ_MULTIPLY_TILE multiply_tile_avx2
#define RQ_VECTOR_BYTES 32
#define RQ_VECTORS 2
#define RQ_ADD_PRODUCTS(sum, pairs, factors) ((sum) + (Whole)_mm256_madd_epi16((__m256i)(pairs), _mm256_set1_epi32(factors)))
#include "gptq_tile.h"
#include "product_tile.h"
