// Rounds the factors of one block's columns. The including file defines the name of the function (RQ_ROUND_FACTORS), and what
// pairs.h needs.
#include <algorithm>
#include <cstring>

#include "factors.h"
#include "gptq.h"
#include "pairs.h"
#include "transpose.h"

namespace {

// The columns of one block are the lanes: their factors for a later column are rounded together, in one unit.
struct FactorTile {
  const Factors& all;
  int64_t part, own;  // the number of the block
  int64_t vectors;    // for the factors for a column, filled up to whole products
  // [known, vectors]: the factors for later columns, divided by the balance. Those of a rounded column are replaced by their
  // rounding errors.
  Vector* values;

  int64_t blocks() const { return all.known / all.block; }
  const float* row(int64_t column) const { return all.factors + (part * all.known + column) * all.known; }
  Vector* of(int64_t column) const { return values + column * vectors; }

  void load() const {
    const float* balance = all.balance + part * all.known;
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t c = (own + 1) * all.block; c < all.known; c += kLanes) {
        Vector square[kLanes] = {};
        for (int64_t lane = 0; lane < kLanes && v * kLanes + lane < all.block; ++lane) {
          const int64_t column = own * all.block + v * kLanes + lane;
          std::memcpy(&square[lane], row(column) + c, sizeof(Vector));
          square[lane] /= balance[column];
        }
        transpose<kLanes>(square);
        for (int64_t i = 0; i < kLanes; ++i) of(c + i)[v] = square[i];
      }
  }

  // Rounds the factors for the column with index `c` in block `later`.
  void round(int64_t later, int64_t c) const {
    Vector* column = of(later * all.block + c);
    Vector most = {};
    for (int64_t v = 0; v < vectors; ++v) most = larger(most, magnitude(column[v]));
    float largest = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
    const float unit = largest / static_cast<float>(kGreatestFactor);
    const Vector per_unit = inverse(splat(unit)), greatest = splat(kGreatestFactor);
    const int64_t place = (part * blocks() + later) * blocks() + own;
    all.units[place * all.block + c] = unit;
    uint8_t* to = all.across + place * all.block * all.block + c / 4 * all.block * 4 + c % 4 * 4;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vector whole = nearest(clamp(column[v] * per_unit, -greatest, greatest));
      column[v] -= whole * unit;
      const Whole numbers = __builtin_convertvector(whole, Whole) + kFactorOffset;
      for (int64_t lane = 0; lane < kLanes && v * kLanes + lane < all.block; lane += 4)
        for (int64_t i = 0; i < 4; ++i) to[(v * kLanes + lane) * 4 + i] = static_cast<uint8_t>(numbers[lane + i]);
    }
  }

  void round_block(int64_t later) const {
    const int64_t start = later * all.block;
    for (int64_t c = start; c < start + all.block; c += kColumns) {
      for (int64_t before = (own + 1) * all.block; before < c; before += all.block)
        subtract_products(of(before), std::min(all.block, c - before), vectors, of(c), row(before) + c, all.known);
      for (int64_t i = 0; i < kColumns; ++i) {
        round(later, c - start + i);
        for (int64_t k = i + 1; k < kColumns; ++k)
          for (int64_t v = 0; v < vectors; ++v) of(c + k)[v] -= of(c + i)[v] * row(c + i)[c + k];
      }
    }
  }
};

}  // namespace

void RQ_ROUND_FACTORS(const Factors& factors, int64_t part, int64_t block, float* memory) {
  constexpr int64_t kAtOnce = kVectors * kLanes;
  static_assert(kMostLanes % kAtOnce == 0, "the memory has room for whole products");
  const int64_t vectors = (factors.block + kAtOnce - 1) / kAtOnce * kVectors;
  const FactorTile tile{factors, part, block, vectors, reinterpret_cast<Vector*>(memory)};
  tile.load();
  for (int64_t later = block + 1; later < tile.blocks(); ++later) tile.round_block(later);
}
