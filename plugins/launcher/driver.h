// The few entries of the CUDA driver that a launch needs, found in libcuda.so.1 when first asked for: a library that links
// none of it loads where there is no GPU.
#pragma once

#include <cuda.h>

namespace rq {

struct Driver {
  decltype(&::cuCtxGetDevice) cuCtxGetDevice;
  decltype(&::cuCtxGetId) cuCtxGetId;
  decltype(&::cuDeviceGetAttribute) cuDeviceGetAttribute;
  decltype(&::cuFuncSetAttribute) cuFuncSetAttribute;
  decltype(&::cuGetErrorString) cuGetErrorString;
  decltype(&::cuLaunchKernel) cuLaunchKernel;
  decltype(&::cuModuleGetFunction) cuModuleGetFunction;
  decltype(&::cuModuleLoadData) cuModuleLoadData;
};

// Throws std::runtime_error if there is no driver, or one older than CUDA 12.
const Driver& driver();

// Throws std::runtime_error with the driver's words unless `result` is a success. `what` was being done.
void check(CUresult result, const char* what);

}  // namespace rq
