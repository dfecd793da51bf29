#include <immintrin.h>
#define RQ_ROUND_TILE round_tile_avx512_vnni
#define RQ_ROUND_FACTORS round_factors_avx512_vnni
#define RQ_PACK_TILE pack_tile_avx512_vnni
#define RQ_MULTIPLY_TILE multiply_tile_avx512_vnni
#define RQ_VECTOR_BYTES 64
#define RQ_VECTORS 4
#define RQ_QUAD_COLUMNS 4
#define RQ_ADD_PRODUCTS(sum, pairs, factors) \
  ((Whole)_mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(pairs), _mm512_set1_epi32(factors)))
#define RQ_ADD_QUAD(sum, quad, factors) _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(factors), (__m512i)(quad))
#define RQ_ADD_QUADS(sum, first, of_first, second, of_second) \
  ((Whole)RQ_ADD_QUAD(RQ_ADD_QUAD((__m512i)(sum), first, of_first), second, of_second))
#include "factors_tile.h"
#include "gptq_tile.h"
#include "product_tile.h"
