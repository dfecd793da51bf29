#include "self_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

namespace rq {
namespace {

constexpr int64_t kColumns = 91, kBlock = 48, kBlocks = 2, kFewRows = 15, kRows = 17,
                  kPanels = 2 * kSideBySide + 1;  // nothing divides evenly

// A linear congruential generator (its upper bits): the check must be the same on every run.
struct Random {
  uint32_t state = 12345;
  uint32_t operator()() { return (state = state * 1664525u + 1013904223u) >> 8; }
  float real() { return static_cast<float>(operator()() & 0xffff) / 32768.0f - 1.0f; }
};

std::vector<uint8_t> random_panels(Storage storage, Random& random) {
  const int bits = bits_of(storage);
  std::vector<uint8_t> panels(static_cast<size_t>(kPanels * kBlocks * words_of(kBlock, bits) * 4 * kPanel));
  for (size_t i = 0; i < panels.size(); i += 4) {
    // fp16 and bf16: small numbers of either sign; fp32: a real number.
    uint32_t word = random() ^ random() << 16;
    if (bits == 16) word = (word & 0x83ff83ffu) | 0x38003800u;
    const float real = random.real();
    std::memcpy(panels.data() + i, bits == 32 ? static_cast<const void*>(&real) : &word, 4);
  }
  return panels;
}

bool close(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0.0f, difference = 0.0f;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i])) return false;
    largest = std::fmax(largest, std::fabs(b[i]));
    difference = std::fmax(difference, std::fabs(a[i] - b[i]));
  }
  return difference <= 1e-5f * largest;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool storage_agrees(const Kernels& kernels, Storage storage, Random& random) {
  const std::vector<uint8_t> data = random_panels(storage, random);
  std::vector<float> scales(kPanels * kBlocks * kPanel), x(kRows * kColumns);
  for (float& scale : scales) scale = random.real();
  std::vector<uint8_t> exponents(scales.size());
  for (uint8_t& exponent : exponents) exponent = static_cast<uint8_t>(random() % 16 + 120);
  const uint8_t* held = scale_bytes(storage) == 1 ? exponents.data() : reinterpret_cast<const uint8_t*>(scales.data());
  for (float& value : x) value = random.real();
  const Matrix weights{storage, data.data(), data.size() / kPanels, held, kColumns, kBlock, kBlocks};
  const QuantizedLayout layout = quantized_layout(kBlock, kBlocks);
  std::vector<uint8_t> records(static_cast<size_t>(kRows * layout.row_bytes)), plain_records = records;
  std::vector<float> bfloats(x), plain_bfloats(x);
  std::vector<const float*> floats, as_bfloats, plain_as_bfloats;
  std::vector<const uint8_t*> quantized;
  for (int64_t i = 0; i < kRows; ++i) {
    floats.push_back(x.data() + i * kColumns);
    as_bfloats.push_back(bfloats.data() + i * kColumns);
    plain_as_bfloats.push_back(plain_bfloats.data() + i * kColumns);
    kernels.round_to_bfloat(floats[i], kColumns, bfloats.data() + i * kColumns);
    kPlainKernels.round_to_bfloat(floats[i], kColumns, plain_bfloats.data() + i * kColumns);
    quantized.push_back(records.data() + i * layout.row_bytes);
    kernels.quantize(floats[i], kColumns, layout, records.data() + i * layout.row_bytes);
    kPlainKernels.quantize(floats[i], kColumns, layout, plain_records.data() + i * layout.row_bytes);
  }
  if (records != plain_records) return false;
  // All numbers of rows that a kernel may process at once, and more; single panels, stretches of one and two, and a rest. The
  // last number is more than a tile of AMX has.
  constexpr int64_t kCounts[] = {1, 2, 4, kPanels};
  for (int64_t i = 0; i <= kFewRows * 4; ++i) {
    const int64_t rows = i < kFewRows * 4 ? i / 4 + 1 : kRows, panels = kCounts[i < kFewRows * 4 ? i % 4 : 3];
    const int64_t first = kPanels - panels;
    std::vector<float> out(panels * rows * kPanel), expected = out;
    kPlainKernels.multiply_floats(floats.data(), rows, weights, first, panels, expected.data());
    kernels.multiply_floats(floats.data(), rows, weights, first, panels, out.data());
    if (!close(out, expected)) return false;
    out.resize(panels * kColumns * kPanel), expected.resize(out.size());
    kPlainKernels.convert(weights, first, panels, expected.data());
    kernels.convert(weights, first, panels, out.data());
    if (!same(out, expected)) return false;
    if (storage == Storage::bf16) {
      kPlainKernels.multiply_bfloats(plain_as_bfloats.data(), rows, weights, first, panels, expected.data());
      kernels.multiply_bfloats(as_bfloats.data(), rows, weights, first, panels, out.data());
      if (!close(out, expected)) return false;
    }
    if (!takes_int8(storage)) continue;
    kPlainKernels.multiply_quantized(quantized.data(), rows, layout, weights, first, panels, expected.data());
    kernels.multiply_quantized(quantized.data(), rows, layout, weights, first, panels, out.data());
    if (!same(out, expected)) return false;
  }
  return true;
}

bool activations_agree(const Kernels& kernels, Random& random) {
  std::vector<float> up(64), gate(64);
  for (int kind = 0; kind <= static_cast<int>(Activation::relu2); ++kind) {
    for (float& value : up) value = 8.0f * random.real();
    for (float& value : gate) value = 8.0f * random.real();
    std::vector<float> expected = gate;
    kernels.activate(static_cast<Activation>(kind), 1.5f, 6.0f, up.data(), gate.data(), 64);
    kPlainKernels.activate(static_cast<Activation>(kind), 1.5f, 6.0f, up.data(), expected.data(), 64);
    if (!same(gate, expected)) return false;
  }
  return true;
}

bool sums_agree(const Kernels& kernels, Random& random) {
  constexpr int64_t kRowsOfASum = 3, kLength = 139;
  std::vector<float> x(kRowsOfASum * kLength), gates(kRowsOfASum), out(kLength), expected(kLength);
  for (float& value : x) value = random.real();
  for (float& gate : gates) gate = random.real();
  const float* rows[] = {x.data() + kLength, x.data(), x.data() + 2 * kLength};
  kernels.combine(rows, gates.data(), kRowsOfASum, kLength, out.data());
  kPlainKernels.combine(rows, gates.data(), kRowsOfASum, kLength, expected.data());
  return same(out, expected);
}

// Products of queries and keys, softmax and weighted sums of values, of widths that no vector divides and others.
bool attention_agrees(const Kernels& kernels, Random& random) {
  constexpr int64_t kQueries = 11, kKeys = 39, kStride = 48;
  for (int64_t width : {8, 91, 256}) {
    std::vector<float> queries(kQueries * width), keys(kKeys * width), scores(kQueries * kStride), expected = scores;
    for (float& value : queries) value = random.real();
    for (float& value : keys) value = random.real();
    kernels.dot_keys(queries.data(), kQueries, keys.data(), kKeys, width, scores.data(), kStride);
    kPlainKernels.dot_keys(queries.data(), kQueries, keys.data(), kKeys, width, expected.data(), kStride);
    for (int64_t i = 0; i < kQueries * kStride; ++i) {  // beyond the keys, anything may have been written
      if (i % kStride >= kKeys) scores[i] = expected[i] = 0.0f;
    }
    if (!close(scores, expected)) return false;

    for (int64_t i = 0; i < kQueries * kStride; ++i) expected[i] = i % kStride < kKeys ? expected[i] : -INFINITY;
    std::vector<float> weights(expected), plain_weights(expected), lanes(4 * kPanel), plain_lanes(lanes);
    for (const auto& [set, to, of] : {std::tuple{&kernels, &weights, &lanes}, {&kPlainKernels, &plain_weights, &plain_lanes}}) {
      std::fill(of->begin(), of->end(), -INFINITY);
      set->raise(to->data(), kQueries * kStride / kPanel, of->data());
      set->exponentials(to->data(), kQueries * kStride / kPanel, of->data(), of->data() + kPanel);
      set->raise(to->data(), 0, of->data() + 2 * kPanel);  // nothing: stays -infinity
      set->exponentials(of->data() + 2 * kPanel, 1, of->data() + 2 * kPanel, of->data() + 3 * kPanel);
    }
    if (!same(weights, plain_weights) || !same(lanes, plain_lanes)) return false;

    for (int64_t rows = 1; rows <= kQueries; ++rows) {  // a query's weights one after the other, and those of all queries
      for (const int64_t apart : {kStride, int64_t{1}}) {
        const int64_t next = apart == 1 ? kQueries : 1;
        std::vector<float> out(rows * width, 0.25f), sums(out), factors(rows, 0.5f);
        kernels.weigh_values(weights.data(), apart, next, rows, keys.data(), kKeys, width, factors.data(), out.data());
        kPlainKernels.weigh_values(weights.data(), apart, next, rows, keys.data(), kKeys, width, factors.data(), sums.data());
        if (!close(out, sums)) return false;
      }
    }
  }
  return true;
}

}  // namespace

bool agrees_with_plain(const Kernels& kernels) {
  if (&kernels == &kPlainKernels) return true;
  Random random;
  constexpr Storage kEvery[] = {Storage::fp32,  Storage::fp16, Storage::bf16, Storage::int8, Storage::int4,
                                Storage::mxfp4, Storage::fp8,  Storage::int3, Storage::int2};
  for (Storage storage : kEvery) {
    if (!storage_agrees(kernels, storage, random)) return false;
  }
  return activations_agree(kernels, random) && sums_agree(kernels, random) && attention_agrees(kernels, random);
}

}  // namespace rq
