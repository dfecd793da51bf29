// The kernels embedded in this library, and how to launch them. embed.py writes the table from kernels.json.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace rq {

// All parameters that a kernel may have, by their names in kernels.json. The last lines are the values that a grid may depend on.
struct Arguments {
  CUdeviceptr ids, counts, replicas, offsets, tiles, tile_count, rows, gates, x, y, out;
  CUdeviceptr formats, weights, float_weights, int8_packed, int8_scales, int4_packed, int4_scales, mxfp4_packed, mxfp4_scales,
      fp8_packed, fp8_scales, int3_packed, int3_scales, int2_packed, int2_scales, bias;
  CUdeviceptr global_scratch, profile_scratch;  // null: no kernel of this library uses them
  int32_t pairs, chunks, experts, width, slots, rows_per_tile;
  int32_t top_k, columns, outputs, biased, block, activation, hidden;
  float alpha, limit;
  int32_t tokens, row_tiles;
  int32_t one = 1;
};

// The GPUs that an image runs on, in addition to those of its own SM.
enum class RunsOn {
  kItself,      // a cubin that uses features that only its architecture has
  kLaterMinor,  // a cubin: later SMs of the same major number
  kLater        // PTX, which the driver translates
};

struct Build {
  int sm;
  RunsOn runs_on;
  const char* entry;
  unsigned shared;  // bytes of dynamic shared memory
  const unsigned char* image;
};

// One dimension of a grid: an argument over `divisor`, rounded up.
struct GridRule {
  uint16_t offset;
  int32_t divisor;
};

struct Kernel {
  const char* name;
  unsigned warps;
  int step;  // columns of quantized weights per step, a divisor of the block; 0 without quantized weights
  GridRule grid[3];
  std::vector<uint16_t> parameters;  // offsets in Arguments
  std::vector<Build> builds;         // cubins by ascending SM, then at most one PTX
};

// The values of tiles.py at the time the kernels were built.
struct TileSize {
  const char* name;
  int rows;
  bool few_bits;  // whether layers with slots in int3 or int2 have it; then they have all smaller ones, too
};

// embed.py defines these four.
extern const std::vector<Kernel> kernels;
extern const std::vector<TileSize> tile_sizes;  // ascending rows
extern const int reread;                        // rows whose products take as long as reading their weights again
extern const int small;                         // the most pairs of dispatch_small

// Null if this library was built without that kernel.
const Kernel* find_kernel(const std::string& name);

// The build for a GPU of compute capability `sm` (90 stands for 9.0): the latest cubin that runs there, else PTX. Null if there
// is none.
const Build* build_for(const Kernel& kernel, int sm);

// A kernel on the GPU of one context.
struct Loaded {
  const Kernel* kernel;
  unsigned shared;
  CUfunction function;
};

// Loads a kernel into the current context, once per context. Throws std::runtime_error. Must not be called during stream capture.
Loaded load(const Kernel& kernel);

// Neither allocates nor synchronises. A grid without programs is not launched. Throws std::runtime_error.
void launch(const Loaded& loaded, const Arguments& arguments, CUstream stream);

}  // namespace rq
