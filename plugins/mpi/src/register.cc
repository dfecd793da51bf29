// The op library's exported function. A session refuses two libraries that add to one domain.
#include "exchange.h"
#include "registration.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  return rq::register_ops(options, base, "librq_moe_mpi.so", rq::kApiVersion,
                          {rq::exchange_dispatch_op(), rq::exchange_return_op()}, "rq.moe.mpi");
}
