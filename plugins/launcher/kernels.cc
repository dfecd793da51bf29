#include "kernels.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "driver.h"

namespace rq {
namespace {

constexpr unsigned kThreadsOfWarp = 32;
constexpr size_t kMostParameters = sizeof(Arguments) / 4;
constexpr unsigned kSharedWithoutAsking = 48 * 1024;

int compute_capability() {
  CUdevice device;
  int major, minor;
  check(driver().cuCtxGetDevice(&device), "asking for the current GPU");
  check(driver().cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "asking for the GPU's SM");
  check(driver().cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "asking for the GPU's SM");
  return 10 * major + minor;
}

Loaded load_anew(const Kernel& kernel) {
  const int sm = compute_capability();
  const Build* build = build_for(kernel, sm);
  if (!build) throw std::runtime_error(std::string(kernel.name) + " was not built for SM " + std::to_string(sm));
  CUmodule module;
  Loaded loaded{&kernel, build->shared, nullptr};
  check(driver().cuModuleLoadData(&module, build->image), kernel.name);
  check(driver().cuModuleGetFunction(&loaded.function, module, build->entry), kernel.name);
  if (build->shared > kSharedWithoutAsking) {
    const auto attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    check(driver().cuFuncSetAttribute(loaded.function, attribute, static_cast<int>(build->shared)), kernel.name);
  }
  return loaded;
}

unsigned programs(const GridRule& rule, const Arguments& arguments) {
  const auto value = *reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(&arguments) + rule.offset);
  return static_cast<unsigned>(value / rule.divisor + (value % rule.divisor != 0));
}

}  // namespace

const Kernel* find_kernel(const std::string& name) {
  for (const Kernel& kernel : kernels)
    if (kernel.name == name) return &kernel;
  return nullptr;
}

const Build* build_for(const Kernel& kernel, int sm) {
  const Build* best = nullptr;
  for (const Build& build : kernel.builds) {
    if (best && build.runs_on == RunsOn::kLater) break;
    const bool same_major = build.sm / 10 == sm / 10;
    const bool runs_later = build.runs_on == RunsOn::kLater || (build.runs_on == RunsOn::kLaterMinor && same_major);
    if (build.sm == sm || (build.sm < sm && runs_later)) best = &build;
  }
  return best;
}

Loaded load(const Kernel& kernel) {
  // A module lives as long as its context. The number of a context is never used again.
  static std::mutex mutex;
  static std::map<std::pair<unsigned long long, const Kernel*>, Loaded> known;
  unsigned long long context;
  check(driver().cuCtxGetId(nullptr, &context), "asking for the current CUDA context");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(context, &kernel);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, load_anew(kernel)).first;
  return found->second;
}

void launch(const Loaded& loaded, const Arguments& arguments, CUstream stream) {
  const Kernel& kernel = *loaded.kernel;
  unsigned grid[3];
  for (int i = 0; i < 3; ++i) {
    grid[i] = programs(kernel.grid[i], arguments);
    if (grid[i] == 0) return;
  }
  void* parameters[kMostParameters];
  size_t count = 0;
  char* base = const_cast<char*>(reinterpret_cast<const char*>(&arguments));  // the driver only reads it
  for (uint16_t offset : kernel.parameters) parameters[count++] = base + offset;
  const unsigned threads = kThreadsOfWarp * kernel.warps;
  check(driver().cuLaunchKernel(loaded.function, grid[0], grid[1], grid[2], threads, 1, 1, loaded.shared, stream, parameters,
                                nullptr),
        kernel.name);
}

}  // namespace rq
