// Vectors of RQ_VECTOR_BYTES, their products with factors in fp32, and products of pairs of int16. The including file also
// defines how many vectors a product holds in registers (RQ_VECTORS) and, if the processor has an instruction for products of pairs,
// `add_products` (RQ_ADD_PRODUCTS).
#pragma once

#include <cstdint>
#include <limits>

namespace {

typedef float Vector __attribute__((vector_size(RQ_VECTOR_BYTES)));
// Two neighbouring columns of each lane as int16, the first in the lower half.
typedef uint32_t Pair __attribute__((vector_size(RQ_VECTOR_BYTES)));
typedef int32_t Whole __attribute__((vector_size(RQ_VECTOR_BYTES)));
constexpr int kLanes = RQ_VECTOR_BYTES / sizeof(float);
constexpr int kVectors = RQ_VECTORS;
// The number of columns, or rows, that a product computes at a time. Every block is a multiple of it.
constexpr int kColumns = 4;

inline Vector splat(float value) { return value - Vector{}; }

inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }
inline Vector smaller(Vector x, Vector y) { return x < y ? x : y; }
inline Vector magnitude(Vector x) { return x < 0 ? -x : x; }
inline Vector clamp(Vector x, Vector low, Vector high) { return smaller(larger(x, low), high); }

// Rounds to the nearest integer, ties to even. |x| must be below 2**22.
inline Vector nearest(Vector x) {
  const Vector shift = splat(12582912.0f);  // 1.5 * 2**23: the sum has no fraction bits
  return (x + shift) - shift;
}

// 1 / scale; 0 if the scale is 0, or so small that its inverse is infinite.
inline Vector inverse(Vector scale) {
  const Vector inverse = 1.0f / scale;
  return magnitude(inverse) <= splat(std::numeric_limits<float>::max()) ? inverse : Vector{};
}

// Subtracts from kColumns columns the products of `count` columns of `errors` with factors. A column has `vectors` vectors, a
// multiple of kVectors. The factors of each of `errors` are `apart` behind those of the one before.
inline void subtract_products(const Vector* errors, int64_t count, int64_t vectors, Vector* columns, const float* factors,
                              int64_t apart) {
  for (int64_t first = 0; first < vectors; first += kVectors) {
    Vector sums[kColumns][kVectors];
    for (int c = 0; c < kColumns; ++c)
      for (int v = 0; v < kVectors; ++v) sums[c][v] = columns[c * vectors + first + v];
    for (int64_t j = 0; j < count; ++j)
      for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) sums[c][v] -= errors[j * vectors + first + v] * factors[j * apart + c];
    for (int c = 0; c < kColumns; ++c)
      for (int v = 0; v < kVectors; ++v) columns[c * vectors + first + v] = sums[c][v];
  }
}

// Two columns of whole numbers in the range of int16.
inline Pair paired(Vector first, Vector second) {
  return reinterpret_cast<Pair>((__builtin_convertvector(first, Whole) & 0xffff) | __builtin_convertvector(second, Whole) << 16);
}

// sum + the first column of each pair * its factor + the second column * its factor.
inline Whole add_products(Whole sum, Pair columns, uint32_t factors) {
#ifdef RQ_ADD_PRODUCTS
  return RQ_ADD_PRODUCTS(sum, columns, factors);
#else
  const Whole both = reinterpret_cast<Whole>(columns);
  return sum + (both << 16 >> 16) * static_cast<int16_t>(factors) + (both >> 16) * static_cast<int16_t>(factors >> 16);
#endif
}

// Adds to `sums` the products of `count` pairs of columns, `apart` vectors from each other, with the factors of kColumns others.
// The factors of a pair are `kNext` behind those of the pair before, and those of a column `kColumn` behind those of the column
// before.
template <int64_t kNext, int64_t kColumn>
inline void add_pairs(const Pair* pairs, int64_t apart, int64_t count, const uint32_t* factors,
                      Whole (&sums)[kColumns][kVectors]) {
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < kColumns; ++c)
      for (int v = 0; v < kVectors; ++v)
        sums[c][v] = add_products(sums[c][v], pairs[j * apart + v], factors[j * kNext + c * kColumn]);
}

}  // namespace
