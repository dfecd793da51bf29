#include <immintrin.h>
#define RQ_ROUND_TILE round_tile_avx512
#define RQ_ROUND_FACTORS round_factors_avx512
#define RQ_PACK_TILE pack_tile_avx512
#define RQ_MULTIPLY_TILE multiply_tile_avx512
#define RQ_VECTOR_BYTES 64
#define RQ_VECTORS 4
#define RQ_QUAD_COLUMNS 4
#define RQ_ADD_PRODUCTS(sum, pairs, factors) ((sum) + (Whole)_mm512_madd_epi16((__m512i)(pairs), _mm512_set1_epi32(factors)))
#define RQ_MULTIPLY_QUAD(quad, factors) _mm512_maddubs_epi16(_mm512_set1_epi32(factors), (__m512i)(quad))
#define RQ_ADD_QUADS(sum, first, of_first, second, of_second)                                                                 \
  ((sum) + (Whole)_mm512_madd_epi16(_mm512_add_epi16(RQ_MULTIPLY_QUAD(first, of_first), RQ_MULTIPLY_QUAD(second, of_second)), \
                                    _mm512_set1_epi16(1)))
#include "factors_tile.h"
#include "gptq_tile.h"
#include "product_tile.h"
