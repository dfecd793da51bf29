// A libcuda.so.1 of the few entries that the launcher uses: it hands each launch to a function of the test's.
#include <cuda.h>

#include <map>
#include <string>

namespace {

using Launched = int (*)(const void* image, const char* entry, const unsigned* grid, unsigned threads, unsigned shared,
                         void** parameters);

struct Function {
  const void* image;
  std::string entry;
  int allowed_shared;
};

int sm = 80;
Launched launched = nullptr;
int modules = 0;
CUstream stream = nullptr;

}  // namespace

extern "C" {

void stand_in(int capability, Launched function) {
  sm = capability;
  launched = function;
}
int modules_loaded() { return modules; }
void* stream_of_last_launch() { return stream; }

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetId(CUcontext, unsigned long long* id) {
  *id = static_cast<unsigned long long>(sm);  // another GPU, another context
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? sm / 10 : sm % 10;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  ++modules;
  *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = reinterpret_cast<CUfunction>(new Function{module, name, 48 * 1024});
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Function*>(function)->allowed_shared = value;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** words) {
  *words = "the stand-in refuses";
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                        unsigned shared, CUstream given, void** parameters, void**) {
  stream = given;
  const auto* held = reinterpret_cast<const Function*>(function);
  if (static_cast<int>(shared) > held->allowed_shared) return CUDA_ERROR_INVALID_VALUE;
  const unsigned grid[] = {x, y, z};
  return launched(held->image, held->entry.c_str(), grid, threads, shared, parameters) ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

}  // extern "C"
