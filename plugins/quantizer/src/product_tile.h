// The functions of product.h. The including file defines their names (RQ_PACK_TILE, RQ_MULTIPLY_TILE), and what pairs.h needs.
#include <algorithm>
#include <cstring>

#include "gptq.h"
#include "pairs.h"
#include "product.h"

namespace {

constexpr int kTokenVectors = kTileTokens / kLanes;
constexpr float kGreatestInput = 32767;
static_assert(kLargestBlock * 128 * 32767 <= INT32_MAX, "a sum of products fits");

}  // namespace

void RQ_PACK_TILE(const Product& product, int64_t token, Tile16 tile) {
  const int64_t tokens = std::min(kTileTokens, product.tokens - token);
  Pair* pairs = reinterpret_cast<Pair*>(tile.pairs);
  for (int v = 0; v < kTokenVectors; ++v) {
    const int64_t some = std::clamp<int64_t>(tokens - v * kLanes, 0, kLanes);
    const auto column = [&](int64_t c) {
      Vector inputs = {};
      if (c >= product.columns || some == 0) return inputs;
      const float* from = product.inputs + c * product.tokens + token + v * kLanes;
      if (some == kLanes) std::memcpy(&inputs, from, sizeof inputs);
      else std::memcpy(&inputs, from, some * sizeof(float));
      return inputs;
    };
    for (int64_t start = 0; start < product.blocks * product.block; start += product.block) {
      Vector largest = {};
      for (int64_t c = start; c < start + product.block; ++c) largest = larger(largest, magnitude(column(c)));
      const Vector unit = largest / kGreatestInput, per_unit = inverse(unit);
      std::memcpy(tile.units + start / product.block * kTileTokens + v * kLanes, &unit, sizeof unit);
      for (int64_t c = start; c < start + product.block; c += 2)
        pairs[c / 2 * kTokenVectors + v] = paired(nearest(column(c) * per_unit), nearest(column(c + 1) * per_unit));
    }
  }
}

void RQ_MULTIPLY_TILE(const Product& product, int64_t row, int64_t token, Tile16 tile) {
  const int64_t rows = std::min(kProductRows, product.rows - row), tokens = std::min(kTileTokens, product.tokens - token);
  const Pair* pairs = reinterpret_cast<const Pair*>(tile.pairs);
  const Vector* units = reinterpret_cast<const Vector*>(tile.units);
  Vector outputs[kProductRows][kTokenVectors] = {};
  for (int64_t b = 0; b < product.blocks; ++b)
    for (int64_t r = 0; r < rows; r += kColumns) {
      uint32_t numbers[kColumns][kLargestBlock / 2] = {};
      float scales[kColumns] = {};
      for (int64_t c = 0; c < std::min<int64_t>(kColumns, rows - r); ++c) {
        const int64_t place = (row + r + c) * product.blocks + b;
        const int8_t* q = product.q + place * product.block;
        int16_t wide[kLargestBlock];
        for (int64_t i = 0; i < product.block; ++i) wide[i] = q[i];
        std::memcpy(numbers[c], wide, product.block * sizeof(int16_t));
        scales[c] = product.scales[place];
      }
      for (int first = 0; first * kLanes < tokens; first += kVectors) {
        Whole sums[kColumns][kVectors] = {};
        add_pairs<1, kLargestBlock / 2>(pairs + b * product.block / 2 * kTokenVectors + first, kTokenVectors, product.block / 2,
                                        numbers[0], sums);
        for (int c = 0; c < kColumns; ++c)
          for (int v = 0; v < kVectors; ++v)
            outputs[r + c][first + v] +=
                __builtin_convertvector(sums[c][v], Vector) * (units[b * kTokenVectors + first + v] * scales[c]);
      }
    }
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(product.outputs + (row + r) * product.tokens + token, outputs[r], tokens * sizeof(float));
}
