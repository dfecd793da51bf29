// Sums of products of small integers, four neighbouring columns in each 32-bit lane. The including file defines what pairs.h
// needs, RQ_QUAD_COLUMNS, and, if the processor has instructions for it, `add_quads` (RQ_ADD_QUADS).
#pragma once

#include "gptq.h"
#include "pairs.h"

namespace {

// Four columns of each lane as int8, the first in the lowest byte.
typedef uint32_t Quad __attribute__((vector_size(RQ_VECTOR_BYTES)));
// The vectors of rows, and the columns (RQ_QUAD_COLUMNS), whose sums the processor holds in registers.
constexpr int kQuadVectors = 4;
constexpr int kQuadColumns = RQ_QUAD_COLUMNS;

inline Quad quad(const Whole (&columns)[4]) {
  return reinterpret_cast<Quad>((columns[0] & 0xff) | (columns[1] & 0xff) << 8 | (columns[2] & 0xff) << 16 | columns[3] << 24);
}

// sum + the products of the columns in two quads with their factors, uint8. The sum of four products fits into int16, see gptq.h.
inline Whole add_quads(Whole sum, Quad first, uint32_t of_first, Quad second, uint32_t of_second) {
#ifdef RQ_ADD_QUADS
  return RQ_ADD_QUADS(sum, first, of_first, second, of_second);
#else
  // The columns at even and at odd places are pairs.
  const auto add = [&](Quad quad, uint32_t factors) {
    const Whole bytes = reinterpret_cast<Whole>(quad);
    const Whole even = (bytes << 24 >> 24 & 0xffff) | bytes << 8 >> 24 << 16;
    const Whole odd = (bytes << 16 >> 24 & 0xffff) | bytes >> 24 << 16;
    sum = add_products(sum, reinterpret_cast<Pair>(even), factors & 0x00ff00ff);
    sum = add_products(sum, reinterpret_cast<Pair>(odd), factors >> 8 & 0x00ff00ff);
  };
  add(first, of_first);
  add(second, of_second);
  return sum;
#endif
}

}  // namespace
