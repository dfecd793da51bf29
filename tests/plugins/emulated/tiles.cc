// The products of AMX, in many shapes: rows in several strips of tiles, blocks that do not fill a tile, many columns.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

using rq::kPanel;
using rq::Storage;

constexpr int64_t kPanels = 6, kFirst = 1;  // an incomplete group of panels, behind another panel
std::mt19937 generator(1);
float real() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

std::vector<uint8_t> random_bytes(int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  return bytes;
}

template <typename Number>
std::vector<const Number*> starts(const std::vector<Number>& numbers, int64_t rows) {
  std::vector<const Number*> rows_of(rows);
  for (int64_t i = 0; i < rows; ++i) rows_of[rows - 1 - i] = numbers.data() + i * (numbers.size() / rows);  // in no order
  return rows_of;
}

bool quantized_agree(Storage storage, int64_t rows, int64_t columns, int64_t block) {
  const int64_t blocks = (columns + block - 1) / block;
  const int64_t panel_bytes = blocks * rq::words_of(block, rq::bits_of(storage)) * 4 * kPanel;
  const std::vector<uint8_t> data = random_bytes((kFirst + kPanels) * panel_bytes);
  std::vector<float> scales((kFirst + kPanels) * blocks * kPanel), x(rows * columns);
  for (float& scale : scales) scale = real();
  for (float& number : x) number = real();
  std::vector<uint8_t> exponents(scales.size());
  for (uint8_t& exponent : exponents) exponent = static_cast<uint8_t>(120 + generator() % 16);
  const uint8_t* held = rq::scale_bytes(storage) == 1 ? exponents.data() : reinterpret_cast<const uint8_t*>(scales.data());
  const rq::Matrix weights{storage, data.data(), static_cast<size_t>(panel_bytes), held, columns, block, blocks};
  const rq::QuantizedLayout layout = rq::quantized_layout(block, blocks);
  std::vector<uint8_t> records(rows * layout.row_bytes);
  for (int64_t i = 0; i < rows; ++i) {
    rq::kPlainKernels.quantize(x.data() + i * columns, columns, layout, records.data() + i * layout.row_bytes);
  }
  std::vector<float> out(kPanels * rows * kPanel, NAN), expected(out);
  const std::vector<const uint8_t*> of_rows = starts(records, rows);
  rq::kAmxQuantized(of_rows.data(), rows, layout, weights, kFirst, kPanels, out.data());
  rq::kPlainKernels.multiply_quantized(of_rows.data(), rows, layout, weights, kFirst, kPanels, expected.data());
  return std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)) == 0;
}

bool bfloats_agree(int64_t rows, int64_t columns) {
  const int64_t panel_bytes = columns * kPanel * 2;
  std::vector<uint8_t> data = random_bytes((kFirst + kPanels) * panel_bytes);
  for (size_t i = 1; i < data.size(); i += 2) data[i] = static_cast<uint8_t>((data[i] & 0x80) | 0x3c);  // small numbers
  const rq::Matrix weights{Storage::bf16, data.data(), static_cast<size_t>(panel_bytes), nullptr, columns, 0, 0};
  std::vector<float> x(rows * columns), plain(x), rounded(x);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) x[i * columns + c] = real();
    rq::kAvx512Bf16Round(x.data() + i * columns, columns, rounded.data() + i * columns);
    rq::kPlainKernels.round_to_bfloat(x.data() + i * columns, columns, plain.data() + i * columns);
  }
  std::vector<float> out(kPanels * rows * kPanel, NAN), expected(out);
  rq::kAmxBfloats(starts(rounded, rows).data(), rows, weights, kFirst, kPanels, out.data());
  rq::kPlainKernels.multiply_bfloats(starts(plain, rows).data(), rows, weights, kFirst, kPanels, expected.data());
  float largest = 0, difference = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    largest = std::fmax(largest, std::fabs(expected[i]));
    difference = std::isfinite(out[i]) ? std::fmax(difference, std::fabs(out[i] - expected[i])) : INFINITY;
  }
  return difference <= 1e-5f * largest;
}

}  // namespace

bool tiles_agree_with_plain() {
  for (const int64_t rows : {9, 16, 63, 130}) {
    for (const Storage storage : {Storage::int8, Storage::int4, Storage::mxfp4, Storage::int3, Storage::int2}) {
      for (const int64_t block : {16, 32, 80, 128}) {
        if (!quantized_agree(storage, rows, 150, block)) return false;
      }
    }
    if (!quantized_agree(Storage::int8, rows, 1100, 1024)) return false;
  }
  for (const int64_t rows : {1, 16, 65}) {
    for (const int64_t columns : {1, 32, 255, 257, 600}) {
      if (!bfloats_agree(rows, columns)) return false;
    }
  }
  return true;
}
