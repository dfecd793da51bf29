// One tile of rows, written once over vectors of RQ_VECTOR_BYTES; the including file names the function (RQ_ROUND_TILE) and says
// how many vectors of rows a product holds in registers (RQ_VECTORS).
#include <algorithm>
#include <cmath>
#include <limits>

#include "gptq.h"

namespace {

typedef float Vector __attribute__((vector_size(RQ_VECTOR_BYTES)));
constexpr int kLanes = RQ_VECTOR_BYTES / sizeof(float);
constexpr int kVectors = RQ_VECTORS;
constexpr int kTileVectors = kTileRows / kLanes;
// Columns that a product computes at a time; divides every block.
constexpr int kColumns = 4;
// Earlier columns that a product goes through at a time, so that their errors stay in the first cache.
constexpr int64_t kDepth = 64;
constexpr int64_t kLargestBlock = 128;

inline Vector splat(float value) { return value - Vector{}; }

inline Vector clamp(Vector x, Vector low, Vector high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// To the nearest whole number, ties to the even one, of |x| < 2**22.
inline Vector nearest(Vector x) {
  const Vector shift = splat(12582912.0f);  // 1.5 * 2**23: the sum has no fraction bits
  return (x + shift) - shift;
}

struct Tile {
  const Matrix& matrix;
  int64_t rows;      // of kTileRows
  int64_t width;     // columns, filled up
  Vector* values;    // [width, kTileVectors]: weights, and once a column is rounded what was rounded away of it
  Vector scales[kTileVectors], inverses[kTileVectors];
  int8_t q[kLargestBlock * kTileRows];

  // False where a weight is not finite.
  bool load(int64_t row) {
    float* to = reinterpret_cast<float*>(values);
    std::fill(to, to + width * kTileRows, 0.0f);
    bool finite = true;
    constexpr int64_t kAtOnce = 16;
    for (int64_t first = 0; first < matrix.columns; first += kAtOnce) {
      const int64_t last = std::min(first + kAtOnce, matrix.columns);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = matrix.weights + (row + r) * matrix.columns;
        for (int64_t c = first; c < last; ++c) {
          to[c * kTileRows + r] = from[c];
          finite &= std::fabs(from[c]) <= std::numeric_limits<float>::max();
        }
      }
    }
    return finite;
  }

  // Takes what was rounded away of the columns [from, to) of a part out of kColumns columns; `feedback` is that of column 0 of
  // the part to the first of them, and rows of it are a block apart.
  void subtract(const Vector* part, int64_t from, int64_t to, Vector* columns, const float* feedback) const {
    for (int first = 0; first < kTileVectors; first += kVectors) {
      Vector sums[kColumns][kVectors];
      for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) sums[c][v] = columns[c * kTileVectors + first + v];
      for (int64_t j = from; j < to; ++j) {
        const Vector* errors = part + j * kTileVectors + first;
        const float* factors = feedback + j * matrix.block;
        for (int c = 0; c < kColumns; ++c)
          for (int v = 0; v < kVectors; ++v) sums[c][v] -= errors[v] * factors[c];
      }
      for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) columns[c * kTileVectors + first + v] = sums[c][v];
    }
  }

  // The scale of every row: of the fractions of the one that just holds its largest weight, that of least squared error. Errors
  // are counted in units of that scale, so that none overflows.
  void choose_scales(const Vector* block, const float* importance) {
    const Vector least = splat(matrix.least), greatest = splat(matrix.greatest);
    for (int v = 0; v < kTileVectors; ++v) {
      Vector low = {}, high = {};
      for (int64_t c = 0; c < matrix.block; ++c) {
        const Vector x = block[c * kTileVectors + v];
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      // A range with one value more on the negative side has it take the largest weight, whatever its sign.
      const Vector holding = matrix.least == -matrix.greatest ? (high > -low ? high : -low) / greatest
                                                               : (high > -low ? high : low) / least;
      const Vector unit = inverse(holding);
      Vector best = splat(1.0f), best_error = splat(std::numeric_limits<float>::infinity());
      for (int64_t f = 0; f < matrix.fraction_count; ++f) {
        const Vector fraction = splat(matrix.fractions[f]), per_fraction = splat(1.0f / matrix.fractions[f]);
        Vector error = {};
        for (int64_t c = 0; c < matrix.block; ++c) {
          const Vector x = block[c * kTileVectors + v] * unit;
          const Vector away = nearest(clamp(x * per_fraction, least, greatest)) * fraction - x;
          error += away * away * importance[c];
        }
        best = error < best_error ? fraction : best;
        best_error = error < best_error ? error : best_error;
      }
      scales[v] = holding * best;
      inverses[v] = inverse(scales[v]);
    }
  }

  // 0 where the scale is 0, or so small that its inverse is infinite.
  static Vector inverse(Vector scale) {
    const Vector inverse = 1.0f / scale, magnitude = inverse < 0 ? -inverse : inverse;
    return magnitude <= splat(std::numeric_limits<float>::max()) ? inverse : Vector{};
  }

  // Rounds the column, number `c` of its block, and leaves in its place what was rounded away.
  void round(Vector* column, int64_t c) {
    const Vector least = splat(matrix.least), greatest = splat(matrix.greatest);
    for (int v = 0; v < kTileVectors; ++v) {
      const Vector whole = nearest(clamp(column[v] * inverses[v], least, greatest));
      column[v] -= whole * scales[v];
      for (int lane = 0; lane < kLanes; ++lane) q[c * kTileRows + v * kLanes + lane] = static_cast<int8_t>(whole[lane]);
    }
  }

  // Columns of the part from `start` on; `feedback` is that of column 0 of the part to the first of them.
  void round_block(Vector* part, int64_t start, const float* feedback, const float* importance) {
    Vector* block = part + start * kTileVectors;
    for (int64_t depth = 0; depth < start; depth += kDepth)
      for (int64_t c = 0; c < matrix.block; c += kColumns)
        subtract(part, depth, std::min(depth + kDepth, start), block + c * kTileVectors, feedback + c);
    choose_scales(block, importance);
    for (int64_t c = 0; c < matrix.block; c += kColumns) {
      Vector* columns = block + c * kTileVectors;
      subtract(part, start, start + c, columns, feedback + c);
      for (int64_t i = 0; i < kColumns; ++i) {
        round(columns + i * kTileVectors, c + i);
        const float* factors = feedback + (start + c + i) * matrix.block + c;
        for (int64_t k = i + 1; k < kColumns; ++k)
          for (int v = 0; v < kTileVectors; ++v) columns[k * kTileVectors + v] -= columns[i * kTileVectors + v] * factors[k];
      }
    }
  }

  void store(int64_t row, int64_t start) const {
    const float* scale = reinterpret_cast<const float*>(scales);
    for (int64_t r = 0; r < rows; ++r) {
      int8_t* to = matrix.q + (row + r) * width + start;
      for (int64_t c = 0; c < matrix.block; ++c) to[c] = q[c * kTileRows + r];
      matrix.scales[((row + r) * width + start) / matrix.block] = scale[r];
    }
  }
};

}  // namespace

bool RQ_ROUND_TILE(const Matrix& matrix, int64_t row, float* memory) {
  const int64_t rows = std::min(kTileRows, matrix.rows - row);
  Tile tile{matrix, rows, matrix.parts * matrix.known, reinterpret_cast<Vector*>(memory), {}, {}, {}};
  if (!tile.load(row)) return false;
  for (int64_t part = 0; part < matrix.parts; ++part) {
    const float* feedback = matrix.feedback + part * matrix.known * matrix.known;
    for (int64_t start = 0; start < matrix.known; start += matrix.block) {
      const int64_t column = part * matrix.known + start;
      tile.round_block(tile.values + part * matrix.known * kTileVectors, start, feedback + start * matrix.known,
                       matrix.importance + column);
      tile.store(row, column);
    }
  }
  return true;
}
