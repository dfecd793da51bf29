#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace rq {
namespace {

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("the CUDA driver has no ") + name + "; install one of CUDA 12 or later");
}

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  Driver found{};
  find(library, "cuCtxGetDevice", found.cuCtxGetDevice);
  find(library, "cuCtxGetId", found.cuCtxGetId);
  find(library, "cuDeviceGetAttribute", found.cuDeviceGetAttribute);
  find(library, "cuFuncSetAttribute", found.cuFuncSetAttribute);
  find(library, "cuGetErrorString", found.cuGetErrorString);
  find(library, "cuLaunchKernel", found.cuLaunchKernel);
  find(library, "cuModuleGetFunction", found.cuModuleGetFunction);
  find(library, "cuModuleLoadData", found.cuModuleLoadData);
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* words = nullptr;
  driver().cuGetErrorString(result, &words);
  throw std::runtime_error(std::string(what) + ": " + (words ? words : "an unknown CUDA error"));
}

}  // namespace rq
