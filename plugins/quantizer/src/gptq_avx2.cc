#include <immintrin.h>
#define RQ_ROUND_TILE round_tile_avx2
#define RQ_ROUND_FACTORS round_factors_avx2
#define RQ_PACK_TILE pack_tile_avx2
#define RQ_MULTIPLY_TILE multiply_tile_avx2
#define RQ_VECTOR_BYTES 32
#define RQ_VECTORS 2
#define RQ_QUAD_COLUMNS 2
#define RQ_ADD_PRODUCTS(sum, pairs, factors) ((sum) + (Whole)_mm256_madd_epi16((__m256i)(pairs), _mm256_set1_epi32(factors)))
#define RQ_MULTIPLY_QUAD(quad, factors) _mm256_maddubs_epi16(_mm256_set1_epi32(factors), (__m256i)(quad))
#define RQ_ADD_QUADS(sum, first, of_first, second, of_second)                                                                 \
  ((sum) + (Whole)_mm256_madd_epi16(_mm256_add_epi16(RQ_MULTIPLY_QUAD(first, of_first), RQ_MULTIPLY_QUAD(second, of_second)), \
                                    _mm256_set1_epi16(1)))
#include "factors_tile.h"
#include "gptq_tile.h"
#include "product_tile.h"
