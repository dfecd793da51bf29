// The kernels, written once over the Vector operations that the including file defines for its instruction set.
#include "kernels.h"

namespace rq {
namespace {

// How one storage is read: a vector of weights at column c of a row, and the last, partial one.
template <Storage storage>
struct Reader;

template <>
struct Reader<Storage::fp32> {
  static Vector at(const uint8_t* row, int64_t c, float) { return load(reinterpret_cast<const float*>(row) + c); }
};
template <>
struct Reader<Storage::fp16> {
  static Vector at(const uint8_t* row, int64_t c, float) { return load_half(reinterpret_cast<const uint16_t*>(row) + c); }
};
template <>
struct Reader<Storage::bf16> {
  static Vector at(const uint8_t* row, int64_t c, float) { return load_bfloat(reinterpret_cast<const uint16_t*>(row) + c); }
};
template <>
struct Reader<Storage::int8> {
  static Vector at(const uint8_t* row, int64_t c, float scale) { return load_int8(row + c, scale); }
};
template <>
struct Reader<Storage::int4> {
  static Vector at(const uint8_t* row, int64_t c, float scale) { return load_int4(row + c / 2, scale); }
};

constexpr bool quantized(Storage storage) { return storage == Storage::int8 || storage == Storage::int4; }

// The last `left` < kWidth columns: x and float weights end there and are filled up with zeros; quantized rows go on to
// the end of their block.
inline Vector partial(const float* p, int64_t left) {
  float filled[kWidth] = {};
  memcpy(filled, p, static_cast<size_t>(left) * sizeof(float));
  return load(filled);
}
template <Storage storage>
inline Vector last_weights(const uint8_t* row, int64_t c, int64_t left, float scale) {
  if constexpr (quantized(storage)) {
    return Reader<storage>::at(row, c, scale);
  } else {
    constexpr size_t bytes = storage == Storage::fp32 ? 4 : 2;
    uint8_t filled[kWidth * 4] __attribute__((aligned(16))) = {};
    memcpy(filled, row + static_cast<size_t>(c) * bytes, static_cast<size_t>(left) * bytes);
    return Reader<storage>::at(filled, 0, scale);
  }
}

template <Storage storage, int R, int C>
void dots(const float* const* x, const Matrix& weights, int64_t first, float* out, int64_t stride) {
  Vector total[R][C];
  const uint8_t* row[C];
  const float* scales[C] = {};
  for (int j = 0; j < C; ++j) {
    row[j] = weights.data + static_cast<size_t>(first + j) * weights.row_bytes;
    if constexpr (quantized(storage)) scales[j] = weights.scales + (first + j) * weights.blocks;
    for (int i = 0; i < R; ++i) total[i][j] = zero();
  }
  const int64_t block = quantized(storage) ? weights.block : weights.columns;
  float scale[C] = {};
  for (int64_t begin = 0, b = 0; begin < weights.columns; begin += block, ++b) {
    if constexpr (quantized(storage)) {
      for (int j = 0; j < C; ++j) scale[j] = scales[j][b];
    }
    const int64_t end = begin + block < weights.columns ? begin + block : weights.columns;
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) {
      Vector w[C];
      for (int j = 0; j < C; ++j) w[j] = Reader<storage>::at(row[j], c, scale[j]);
      for (int i = 0; i < R; ++i) {
        const Vector v = load(x[i] + c);
        for (int j = 0; j < C; ++j) total[i][j] = multiply_add(v, w[j], total[i][j]);
      }
    }
    if (c < end) {
      for (int j = 0; j < C; ++j) {
        const Vector w = last_weights<storage>(row[j], c, end - c, scale[j]);
        for (int i = 0; i < R; ++i) total[i][j] = multiply_add(partial(x[i] + c, end - c), w, total[i][j]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < C; ++j) out[i * stride + j] = sum(total[i][j]);
  }
}

// The R rows that are left against `count` weight rows, kColumns at a time.
template <Storage storage, int R>
void strip(const float* const* x, const Matrix& weights, int64_t first, int64_t count, float* out, int64_t stride) {
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns) dots<storage, R, kColumns>(x, weights, first + j, out + j, stride);
  for (; j < count; ++j) dots<storage, R, 1>(x, weights, first + j, out + j, stride);
}

template <Storage storage, int R>
void remaining(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out,
               int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return strip<storage, R>(x, weights, first, count, out, stride);
    remaining<storage, R - 1>(x, rows, weights, first, count, out, stride);
  }
}

template <Storage storage>
void multiply_stored(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out,
                     int64_t stride) {
  for (; rows >= kRows; rows -= kRows, x += kRows, out += kRows * stride) {
    strip<storage, kRows>(x, weights, first, count, out, stride);
  }
  remaining<storage, kRows - 1>(x, rows, weights, first, count, out, stride);
}

template <Storage storage>
void dequantize_stored(const Matrix& weights, int64_t first, int64_t count, float* out) {
  const int64_t block = quantized(storage) ? weights.block : weights.columns;
  for (int64_t r = first; r < first + count; ++r, out += weights.columns) {
    const uint8_t* row = weights.data + static_cast<size_t>(r) * weights.row_bytes;
    for (int64_t begin = 0, b = 0; begin < weights.columns; begin += block, ++b) {
      const float scale = quantized(storage) ? weights.scales[r * weights.blocks + b] : 0.0f;
      const int64_t end = begin + block < weights.columns ? begin + block : weights.columns;
      int64_t c = begin;
      for (; c + kWidth <= end; c += kWidth) store(out + c, Reader<storage>::at(row, c, scale));
      if (c < end) {
        float filled[kWidth];
        store(filled, last_weights<storage>(row, c, end - c, scale));
        memcpy(out + c, filled, static_cast<size_t>(end - c) * sizeof(float));
      }
    }
  }
}

#define RQ_BY_STORAGE(function, ...)                                  \
  switch (weights.storage) {                                          \
    case Storage::fp32: return function<Storage::fp32>(__VA_ARGS__);  \
    case Storage::fp16: return function<Storage::fp16>(__VA_ARGS__);  \
    case Storage::bf16: return function<Storage::bf16>(__VA_ARGS__);  \
    case Storage::int8: return function<Storage::int8>(__VA_ARGS__);  \
    case Storage::int4: return function<Storage::int4>(__VA_ARGS__);  \
  }

void multiply(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out,
              int64_t stride) {
  RQ_BY_STORAGE(multiply_stored, x, rows, weights, first, count, out, stride)
}

void dequantize(const Matrix& weights, int64_t first, int64_t count, float* out) {
  RQ_BY_STORAGE(dequantize_stored, weights, first, count, out)
}

}  // namespace

extern const Kernels RQ_KERNELS;
const Kernels RQ_KERNELS = {RQ_KERNELS_NAME, multiply, dequantize};

}  // namespace rq
