// Rounds one tile of rows. The including file defines the name of the function (RQ_ROUND_TILE), and what quads.h needs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "gptq.h"
#include "quads.h"
#include "transpose.h"

namespace {

typedef float Half __attribute__((vector_size(RQ_VECTOR_BYTES / 2)));
typedef double Doubles __attribute__((vector_size(RQ_VECTOR_BYTES)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
// The integers of 16 columns; every block is a multiple of 16 columns.
typedef int8_t Line __attribute__((vector_size(16)));
constexpr int kLine = sizeof(Line);
constexpr int kTileVectors = kTileRows / kLanes;
// The vectors of rows for which a scale is searched at a time: the sums of one alone would wait for each other.
constexpr int kSearched = 4;

// The lowest byte of each integer, and back. GCC has one instruction for each lane where AVX2 has few for all.
inline Bytes bytes(Whole whole) {
#if defined(__AVX2__) && RQ_VECTOR_BYTES == 32
  const __m256i low = _mm256_set1_epi64x(0x0c080400), four = _mm256_shuffle_epi8((__m256i)whole, low);
  return (Bytes)(_mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1))));
#else
  return __builtin_convertvector(whole, Bytes);
#endif
}

inline Whole whole(const int8_t* bytes) {
#if defined(__AVX2__) && RQ_VECTOR_BYTES == 32
  return (Whole)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
  Bytes some;
  std::memcpy(&some, bytes, sizeof some);
  return __builtin_convertvector(some, Whole);
#endif
}

// Not fused with a difference: that would not be 0 where nothing changed.
template <typename Number>
inline Number rounded_product(Number x, float y) {
  Number product = x * y;
  asm("" : "+m"(product));
  return product;
}

struct Tile {
  const Matrix& matrix;
  int64_t rows;   // up to kTileRows
  int64_t width;  // columns, padded to whole parts
  // [width, kTileVectors]: the weights. A rounded column is replaced by its rounding errors. When its block is finished, the
  // errors are negated and packed into quads of columns, from the beginning of the part on, in units of their own for every
  // block and row: `units [known / block, kTileVectors]`. `offsets`, of the same shape, is what a sum of products with these
  // errors exceeds by kFactorOffset, negated.
  Vector* values;
  Vector* units;
  Whole* offsets;
  Vector scales[kTileVectors], inverses[kTileVectors];
  int8_t q[kLargestBlock * kTileRows];

  // Returns false if a weight is not finite.
  bool load(int64_t row) {
    constexpr int64_t kAtOnce = 64;  // so many columns of a row that the processor fetches them ahead
    const float* from = matrix.weights + row * matrix.columns;
    Vector zeros = {};  // NaN once a weight is not finite
    for (int64_t first = 0; first < width; first += kAtOnce)
      for (int v = 0; v < kTileVectors; ++v)
        for (int64_t c = first; c < std::min(first + kAtOnce, width); c += kLanes) {
          Vector square[kLanes] = {};
          for (int64_t r = v * kLanes; r < std::min<int64_t>((v + 1) * kLanes, rows); ++r)
            if (const int64_t count = std::min<int64_t>(kLanes, matrix.columns - c); count == kLanes)
              std::memcpy(&square[r % kLanes], from + r * matrix.columns + c, sizeof(Vector));
            else if (count > 0) std::memcpy(&square[r % kLanes], from + r * matrix.columns + c, count * sizeof(float));
          for (const Vector& weights : square) zeros += weights * 0.0f;
          transpose<kLanes>(square);
          for (int64_t i = 0; i < kLanes; ++i) values[(c + i) * kTileVectors + v] = square[i];
        }
    for (int i = 0; i < kLanes; ++i)
      if (std::isnan(zeros[i])) return false;
    return true;
  }

  // Subtracts from a block of columns the errors of an `earlier` block of the part, times `factors [block / 4, block / 4, 4]` in
  // units `of_columns [block]`.
  void subtract_earlier(const Vector* part, int64_t earlier, Vector* block, const uint32_t* factors,
                        const float* of_columns) const {
    const int64_t quads = matrix.block / 4;
    const Quad* errors = reinterpret_cast<const Quad*>(part) + earlier * quads * kTileVectors;
    for (int64_t column = 0; column < matrix.block; column += kQuadColumns)
      for (int first = 0; first < kTileVectors; first += kQuadVectors)
        subtract_quads(errors + first, earlier * kTileVectors + first, block + column * kTileVectors + first,
                       factors + column / 4 * quads * 4 + column % 4, of_columns + column);
  }

  // The same for kQuadColumns columns and kQuadVectors vectors of rows, whose units are at `place`.
  void subtract_quads(const Quad* errors, int64_t place, Vector* columns, const uint32_t* factors,
                      const float* of_columns) const {
    Whole sums[kQuadColumns][kQuadVectors];
    for (int c = 0; c < kQuadColumns; ++c)
      for (int v = 0; v < kQuadVectors; ++v) sums[c][v] = offsets[place + v];
    for (int64_t j = 0; j < matrix.block / 4; j += 2)
      for (int c = 0; c < kQuadColumns; ++c)
        for (int v = 0; v < kQuadVectors; ++v)
          sums[c][v] = add_quads(sums[c][v], errors[j * kTileVectors + v], factors[j * 4 + c], errors[(j + 1) * kTileVectors + v],
                                 factors[(j + 1) * 4 + c]);
    for (int c = 0; c < kQuadColumns; ++c)
      for (int v = 0; v < kQuadVectors; ++v)
        columns[c * kTileVectors + v] += __builtin_convertvector(sums[c][v], Vector) * (units[place + v] * of_columns[c]);
  }

  // Packs the errors of the block's columns into quads, after those of the earlier blocks. The largest error of a row is
  // kGreatestError units.
  void pack(Vector* part, int64_t start, const float* balance) const {
    Quad* quads = reinterpret_cast<Quad*>(part) + start / 4 * kTileVectors;
    const Vector* columns = part + start * kTileVectors;
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t place = start / matrix.block * kTileVectors + v;
      const auto error = [&](int64_t c) { return columns[c * kTileVectors + v] * balance[c]; };
      Vector largest = {};
      for (int64_t c = 0; c < matrix.block; ++c) largest = larger(largest, magnitude(error(c)));
      units[place] = largest / static_cast<float>(kGreatestError);
      const Vector per_unit = -inverse(units[place]);
      Whole total = {};
      for (int64_t c = 0; c < matrix.block / 4; ++c) {
        Whole errors[4];
        for (int i = 0; i < 4; ++i) total += errors[i] = __builtin_convertvector(nearest(error(4 * c + i) * per_unit), Whole);
        quads[c * kTileVectors + v] = quad(errors);
      }
      offsets[place] = total * -kFactorOffset;
    }
  }

  // Chooses the scale of every row: the scale that just holds its largest weight, times the fraction with the least squared
  // error. Errors are measured in units of that scale, so that they do not overflow.
  void choose_scales(const Vector* block, const float* importance) {
    const Vector least = splat(matrix.least), greatest = splat(matrix.greatest);
    for (int first = 0; first < kTileVectors; first += kSearched) {
      Vector holding[kSearched], unit[kSearched], best[kSearched], best_error[kSearched];
      for (int v = 0; v < kSearched; ++v) {
        Vector low = {}, high = {};
        for (int64_t c = 0; c < matrix.block; ++c) {
          const Vector x = block[c * kTileVectors + first + v];
          low = smaller(x, low);
          high = larger(x, high);
        }
        // If the range has one more value on the negative side, that value represents the largest weight, whatever its sign.
        holding[v] =
            matrix.least == -matrix.greatest ? (high > -low ? high : -low) / greatest : (high > -low ? high : low) / least;
        unit[v] = inverse(holding[v]);
        best[v] = splat(1.0f);
        best_error[v] = splat(std::numeric_limits<float>::infinity());
      }
      for (int64_t f = 0; f < matrix.fraction_count; ++f) {
        const Vector fraction = splat(matrix.fractions[f]);
        Vector per_fraction[kSearched], error[kSearched] = {};
        for (int v = 0; v < kSearched; ++v) per_fraction[v] = unit[v] / fraction;
        for (int64_t c = 0; c < matrix.block; ++c)
          for (int v = 0; v < kSearched; ++v) {
            const Vector x = block[c * kTileVectors + first + v] * per_fraction[v];
            const Vector away = nearest(clamp(x, least, greatest)) - x;
            error[v] += away * away * importance[c];
          }
        for (int v = 0; v < kSearched; ++v) {
          error[v] *= fraction * fraction;
          best[v] = error[v] < best_error[v] ? fraction : best[v];
          best_error[v] = smaller(error[v], best_error[v]);
        }
      }
      for (int v = 0; v < kSearched; ++v) {
        scales[first + v] = holding[v] * best[v];
        inverses[first + v] = inverse(scales[first + v]);
      }
    }
  }

  // Rounds the column with index `c` in its block, and replaces it by its rounding errors.
  void round(Vector* column, int64_t c) {
    const Vector least = splat(matrix.least), greatest = splat(matrix.greatest);
    for (int v = 0; v < kTileVectors; ++v) {
      const Vector whole = nearest(clamp(column[v] * inverses[v], least, greatest));
      column[v] -= whole * scales[v];
      const Bytes some = bytes(__builtin_convertvector(whole, Whole));
      std::memcpy(q + c * kTileRows + v * kLanes, &some, sizeof some);
    }
  }

  // Rounds the block of the part that begins at column `start`. The other arguments are for its columns.
  void round_block(Vector* part, int64_t start, const uint32_t* across, const float* units_of_factors, const float* within,
                   const float* balance, const float* importance) {
    Vector* block = part + start * kTileVectors;
    for (int64_t earlier = 0; earlier < start / matrix.block; ++earlier)
      subtract_earlier(part, earlier, block, across + earlier * matrix.block * matrix.block / 4,
                       units_of_factors + earlier * matrix.block);
    choose_scales(block, importance);
    for (int64_t c = 0; c < matrix.block; c += kColumns) {
      Vector* columns = block + c * kTileVectors;
      subtract_products(block, c, kTileVectors, columns, within + c, matrix.block);
      for (int64_t i = 0; i < kColumns; ++i) {
        round(columns + i * kTileVectors, c + i);
        const float* factors = within + (c + i) * matrix.block + c;
        for (int64_t k = i + 1; k < kColumns; ++k)
          for (int v = 0; v < kTileVectors; ++v) columns[k * kTileVectors + v] -= columns[i * kTileVectors + v] * factors[k];
      }
    }
    if (start + matrix.block < matrix.known) pack(part, start, balance);
  }

  // In double, because squares of very small and very large weights are outside of the range of float.
  template <bool kValues>
  void dequantize(int64_t row, int64_t start, int64_t columns, const int8_t* numbers, float scale) const {
    const float* weights = matrix.weights + row * matrix.columns + start;
    float* to = kValues ? matrix.values + row * matrix.columns + start : nullptr;
    Doubles squares[2] = {};
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      Vector before;
      std::memcpy(&before, weights + c, sizeof before);
      const Vector value = rounded_product(__builtin_convertvector(whole(numbers + c), Vector), scale), change = value - before;
      if (kValues) std::memcpy(to + c, &value, sizeof value);
      Half halves[2];
      std::memcpy(halves, &change, sizeof change);
      for (int i = 0; i < 2; ++i) {
        const Doubles exact = __builtin_convertvector(halves[i], Doubles);
        squares[i] += exact * exact;
      }
    }
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += squares[2 * i / kLanes][i % (kLanes / 2)];
    for (; c < columns; ++c) {
      const float value = rounded_product(static_cast<float>(numbers[c]), scale);
      if (kValues) to[c] = value;
      const double change = value - weights[c];
      total += change * change;
    }
    if (matrix.changes) matrix.changes[row] += total;
  }

  void store(int64_t row, int64_t start) const {
    const float* scale = reinterpret_cast<const float*>(scales);
    int8_t numbers[kTileRows][kLargestBlock];
    for (int64_t c = 0; c < matrix.block; c += kLine)
      for (int64_t r = 0; r < rows; r += kLine) {
        Line square[kLine];
        for (int64_t i = 0; i < kLine; ++i) std::memcpy(&square[i], q + (c + i) * kTileRows + r, kLine);
        transpose<kLine>(square);
        for (int64_t i = 0; i < kLine; ++i) std::memcpy(numbers[r + i] + c, &square[i], kLine);
      }
    const int64_t columns = std::min(matrix.block, matrix.columns - start);
    for (int64_t r = 0; r < rows; ++r) {
      matrix.scales[((row + r) * width + start) / matrix.block] = scale[r];
      if (matrix.q) std::memcpy(matrix.q + (row + r) * width + start, numbers[r], matrix.block);
      if (matrix.values) dequantize<true>(row + r, start, columns, numbers[r], scale[r]);
      else if (matrix.changes) dequantize<false>(row + r, start, columns, numbers[r], scale[r]);
    }
  }
};

}  // namespace

bool RQ_ROUND_TILE(const Matrix& matrix, int64_t row, float* memory) {
  const int64_t rows = std::min(kTileRows, matrix.rows - row);
  const int64_t width = matrix.parts * matrix.known;
  Vector* values = reinterpret_cast<Vector*>(memory);
  Vector* units = values + width * kTileVectors;
  Whole* offsets = reinterpret_cast<Whole*>(units + matrix.known / matrix.block * kTileVectors);
  Tile tile{matrix, rows, width, values, units, offsets, {}, {}, {}};
  if (!tile.load(row)) return false;
  for (int64_t part = 0; part < matrix.parts; ++part) {
    for (int64_t start = 0; start < matrix.known; start += matrix.block) {
      const int64_t column = part * matrix.known + start;
      tile.round_block(tile.values + part * matrix.known * kTileVectors, start, matrix.across + column * matrix.known / 4,
                       matrix.units + column * (matrix.known / matrix.block), matrix.within + column * matrix.block,
                       matrix.balance + column, matrix.importance + column);
      tile.store(row, column);
    }
  }
  return true;
}
