// One product of the kernels of 64-bit ARM: NAME STORAGE ROWS COLUMNS. aarch64_instructions.py counts its instructions.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel_sets.h"

int main(int, char** arguments) {
  const int64_t storage_number = std::atoi(arguments[2]), rows = std::atoi(arguments[3]), columns = std::atoi(arguments[4]);
  rq::Kernels kernels{};
  for (const rq::Kernels& set : {rq::kPlainKernels, rq::kNeonKernels, rq::neon_dotprod_kernels(), rq::neon_i8mm_kernels()}) {
    if (std::strcmp(set.name, arguments[1]) == 0) kernels = set;
  }
  constexpr int64_t kPanels = 4, kBlock = 128;
  const rq::Storage storage = static_cast<rq::Storage>(storage_number);
  const int64_t blocks = columns / kBlock;
  const std::vector<uint8_t> weights(static_cast<size_t>(kPanels * columns * rq::kPanel * 4));
  const std::vector<float> scales(static_cast<size_t>(kPanels * blocks * rq::kPanel)), x(static_cast<size_t>(columns));
  const int bits = storage == rq::Storage::fp32 ? 32 : storage == rq::Storage::int8 ? 8 : storage == rq::Storage::int4 ? 4 : 16;
  const auto* scale_data = reinterpret_cast<const uint8_t*>(scales.data());
  const rq::Matrix matrix{storage, weights.data(), static_cast<size_t>(columns * rq::kPanel * bits / 8), scale_data, columns,
                          kBlock,  blocks};
  std::vector<float> out(static_cast<size_t>(kPanels * rows * rq::kPanel));
  if (storage == rq::Storage::int8 || storage == rq::Storage::int4) {
    const rq::QuantizedLayout layout = rq::quantized_layout(kBlock, blocks);
    const std::vector<uint8_t> record(static_cast<size_t>(layout.row_bytes));
    const std::vector<const uint8_t*> several(static_cast<size_t>(rows), record.data());
    kernels.multiply_quantized(several.data(), rows, layout, matrix, 0, kPanels, out.data());
  } else {
    const std::vector<const float*> several(static_cast<size_t>(rows), x.data());
    kernels.multiply_floats(several.data(), rows, matrix, 0, kPanels, out.data());
  }
  return 0;
}
