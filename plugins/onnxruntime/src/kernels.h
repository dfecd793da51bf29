// The dot-product kernels, one set per instruction set; no standard headers, because the files that include this one
// are compiled for different processors and must not share inline functions.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace rq {

enum class Storage { fp32, fp16, bf16, int8, int4 };

// The weights of one slot: rows of `columns` numbers, row r at data + r * row_bytes; quantized rows also have
// scales[r * blocks ...], one for each `block` columns (the last block padded with zeros).
struct Matrix {
  Storage storage;
  const uint8_t* data;
  size_t row_bytes;
  const float* scales;
  int64_t columns, block, blocks;
};

// One output is one vector of partial sums over ascending columns, added up at the end, whatever the number of rows or
// the storage read: a token's result does not depend on who shares its batch.
struct Kernels {
  const char* name;
  // out[i * stride + j] = dot(x[i], weight row first + j) for i < rows, j < count.
  void (*multiply)(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out,
                   int64_t stride);
  // out[j * columns + c] = weight row first + j, column c, in fp32.
  void (*dequantize)(const Matrix& weights, int64_t first, int64_t count, float* out);
};

extern const Kernels kPlainKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& best_kernels();  // of this processor; RQ_MOE_ISA=plain|avx2|avx512 asks for a lesser one

}  // namespace rq
