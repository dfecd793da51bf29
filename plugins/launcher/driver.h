// The few functions of the CUDA driver that a launch needs. They are looked up in libcuda.so.1 when first used, so that the
// library, which does not link to the driver, can be loaded on a machine without a GPU.
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

// Throws std::runtime_error if there is no driver or if it is older than CUDA 12.
const Driver& driver();

// Throws std::runtime_error with the driver's message unless `result` is a success. `what` names the operation that returned it.
void check(CUresult result, const char* what);

}  // namespace rq
