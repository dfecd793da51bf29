// The AVX-VNNI kernels on a processor without it: its one instruction stands here in AVX2, and the kernels check themselves.
// With an argument the instruction takes the unsigned bytes for signed ones, which the check has to find.
#include <immintrin.h>

bool wrong = false;

// Four products of an unsigned byte of `a` and a signed one of `b`, added to each word of `sum`.
inline __m256i dot_product(__m256i sum, __m256i a, __m256i b) {
  const __m256i low_byte = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
  const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(a, low_byte), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_mullo_epi16(wrong ? _mm256_srai_epi16(a, 8) : _mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
}
#define _mm256_dpbusd_avx_epi32 dot_product

#include "kernels_avxvnni.cc"
#include "kernel_sets.h"
#include "self_check.h"

int main(int count, char**) {
  wrong = count > 1;
  return rq::agrees_with_plain(rq::avxvnni_kernels()) ? 0 : 1;
}
