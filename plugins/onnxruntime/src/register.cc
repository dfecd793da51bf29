// The library's one exported function.
#include "registration.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  return rq::register_ops(options, base, "librq_moe.so", rq::kApiVersion,
                          {rq::dispatch_op(), rq::expert_gemm_op(), rq::combine_op(), rq::dense_gemm_op(),
                           rq::cache_attention_op(), rq::latent_attention_op(), rq::causal_mask_op()});
}
