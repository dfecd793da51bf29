// The library's one exported function.
#include <cstdio>

#include "op.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                                const OrtApiBase* base) {
  const OrtApi* table = base->GetApi(rq::kApiVersion);
  if (!table) {
    // Version 1 of the table exists in every ONNX Runtime and is enough to say no.
    const rq::Api first(base->GetApi(1));
    char message[160];
    std::snprintf(message, sizeof message, "librq_moe.so needs ONNX Runtime 1.%u or newer, this is %s; upgrade onnxruntime",
                  rq::kApiVersion, base->GetVersionString());
    return first.CreateStatus(static_cast<int>(rq::kFail), static_cast<const char*>(message));
  }
  const rq::Api api(table);
  return rq::guarded(api, "registration", [&] {
    // The session keeps a reference to the domain, so it lives as long as the process.
    OrtCustomOpDomain* domain = nullptr;
    rq::check(api, api.CreateCustomOpDomain("rq.moe", &domain));
    for (OrtCustomOp* op : {rq::dispatch_op(), rq::expert_gemm_op(), rq::combine_op(), rq::dense_gemm_op()}) {
      rq::check(api, api.CustomOpDomain_Add(domain, static_cast<const OrtCustomOp*>(op)));
    }
    rq::check(api, api.AddCustomOpDomain(options, domain));
  });
}
