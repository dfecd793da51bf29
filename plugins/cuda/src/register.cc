// The library's one exported function.
#include "moe_layer.h"
#include "registration.h"

namespace {

constexpr uint32_t kNeeded = 18;  // has KernelContext_GetScratchBuffer

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  rq::set_shape_inference_api(base->GetApi(kNeeded));
  return rq::register_ops(options, base, "librq_moe_cuda.so", kNeeded, rq::moe_layer_ops());
}
