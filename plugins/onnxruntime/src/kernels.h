// The dot-product kernels, one set per instruction set; no standard headers, because the files that include this one
// are compiled for different processors and must not share inline functions.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace rq {

enum class Storage { fp32, fp16, bf16, int8, int4, mxfp4, fp8, int3, int2 };
enum class Activation { none, swiglu, geglu, geglu_tanh, clamped_swiglu, limited_swiglu, relu, gelu, relu2 };

constexpr int64_t kPanel = 16;       // weight rows of a panel: the lanes of a kernel
constexpr int64_t kSideBySide = 4;   // the most panels that a kernel processes at once
constexpr int64_t kMaxBlock = 1024;  // dot products of int8 blocks up to here are exact in fp32

constexpr int bits_of(Storage storage) {
  switch (storage) {
    case Storage::fp32: return 32;
    case Storage::fp16:
    case Storage::bf16: return 16;
    case Storage::int8:
    case Storage::fp8: return 8;
    case Storage::int4:
    case Storage::mxfp4: return 4;
    case Storage::int3: return 3;
    case Storage::int2: return 2;
  }
  return 0;
}
// Words of four bytes that hold `columns` quantized weights of a row. Only int3 in blocks of 16 does not fill the last one.
constexpr int64_t words_of(int64_t columns, int64_t bits) { return (columns * bits + 31) / 32; }

// Whether x may be rounded to int8 for the products: the weights are whole numbers times scales.
constexpr bool takes_int8(Storage storage) { return storage >= Storage::int8 && storage != Storage::fp8; }

// Bytes of a scale: fp32, or the exponent of a power of two.
constexpr int64_t scale_bytes(Storage storage) { return storage == Storage::mxfp4 ? 1 : 4; }

// The weights of one slot, in panels of 16 rows: see README.md for the layout. `scales` holds 16 numbers for each panel and
// block; the last block of `columns` is padded.
struct Matrix {
  Storage storage;
  const uint8_t* data;
  size_t panel_bytes;
  const uint8_t* scales;
  int64_t columns, block, blocks;
};

// A row of x rounded to int8 (x = q * scale), block after block; a block consists of a header and `block` numbers q.
struct QuantizedBlock {
  float scale;
  int32_t sum;  // of q
};
struct QuantizedLayout {
  int64_t block, blocks;
  int64_t block_bytes, row_bytes;
};
QuantizedLayout quantized_layout(int64_t block, int64_t blocks);

// For any number of rows, an output is one chain of sums over ascending columns, so a token's result does not depend on the
// other tokens in its batch. With quantized x, it is also the same on every instruction set.
struct Kernels {
  const char* name;
  // out[(p * rows + i) * kPanel + j] = dot(x[i], row j of panel first + p) for i < rows and p < panels.
  void (*multiply_floats)(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t panels, float* out);
  // The same for bf16 weights and rows of x that `round_to_bfloat` rounded.
  void (*multiply_bfloats)(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t panels, float* out);
  // The same for quantized weights and rows of x that `quantize` rounded.
  void (*multiply_quantized)(const uint8_t* const* x, int64_t rows, const QuantizedLayout& layout, const Matrix& weights,
                             int64_t first, int64_t panels, float* out);
  // out[c * panels * kPanel + p * kPanel + j] = row j of panel first + p, column c, for p < panels.
  void (*convert)(const Matrix& weights, int64_t first, int64_t panels, float* out);
  // Round a row of x. `out` of round_to_bfloat has as many bytes as x, and a content that its instruction set chooses.
  void (*round_to_bfloat)(const float* x, int64_t columns, float* out);
  void (*quantize)(const float* x, int64_t columns, const QuantizedLayout& layout, uint8_t* out);
  // gate[i] = activation(gate[i], up[i]) for i < n; an activation without a gate does not read `up`.
  void (*activate)(Activation activation, float alpha, float limit, const float* up, float* gate, int64_t n);
  // out[i] = the sum over r < count, in that order, of gates[r] * rows[r][i], for i < n; starts at 0.
  void (*combine)(const float* const* rows, const float* gates, int64_t count, int64_t n, float* out);

  // Attention. scores[r * stride + k] = dot(query r, key k) for r < rows and k < count; queries and keys stand one after the
  // other.
  void (*dot_keys)(const float* queries, int64_t rows, const float* keys, int64_t count, int64_t columns, float* scores,
                   int64_t stride);
  // `count` times kPanel scores, lane by lane: largest[j] = max(largest[j], every score of lane j); NaN is passed over.
  void (*raise)(const float* scores, int64_t count, float* largest);
  // Replaces them by e^(score - largest[j]), 0 for -infinity and whatever is below e^-87; sums[j]: of the lane.
  void (*exponentials)(float* scores, int64_t count, const float* largest, float* sums);
  // out[r * columns + i] = factors[r] * out[..] + the sum over k < count, in that order, of
  // weights[r * row_stride + k * key_stride] * values[k * columns + i].
  void (*weigh_values)(const float* weights, int64_t row_stride, int64_t key_stride, int64_t rows, const float* values,
                       int64_t count, int64_t columns, const float* factors, float* out);
};

extern const Kernels kPlainKernels, kAvx2Kernels, kAvx512Kernels, kNeonKernels;

// What the other sets have of their own; kernel_sets.h puts them together.
using QuantizedProducts = decltype(Kernels::multiply_quantized);
using BfloatProducts = decltype(Kernels::multiply_bfloats);
using RoundToBfloat = decltype(Kernels::round_to_bfloat);
extern const QuantizedProducts kAvxVnniQuantized, kAvx512VnniQuantized, kAmxQuantized, kNeonDotprodQuantized, kNeonI8mmQuantized;
extern const BfloatProducts kAvx512Bf16Bfloats, kAmxBfloats;
extern const RoundToBfloat kAvx512Bf16Round;

// The fastest set that this processor supports and that passes its self-check, or the set that RQ_MOE_ISA names. Throws
// std::runtime_error, which lists the supported sets, if that set is not supported or fails its self-check.
const Kernels& best_kernels();

}  // namespace rq
