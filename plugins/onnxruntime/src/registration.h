// The implementation of RegisterCustomOps in a library.
#pragma once

#include <cstdio>
#include <vector>

#include "op.h"

namespace rq {

// Adds `ops` to the session as domain `domain_name`, if ONNX Runtime has version `needed` of its interface.
inline OrtStatus* register_ops(OrtSessionOptions* options, const OrtApiBase* base, const char* library, uint32_t needed,
                               const std::vector<const OrtCustomOp*>& ops, const char* domain_name = "rq.moe") {
  const OrtApi* table = base->GetApi(needed);
  if (!table) {
    // Version 1 of the table exists in every ONNX Runtime and suffices to report the error.
    const Api first(base->GetApi(1));
    char message[160];
    std::snprintf(message, sizeof message, "%s needs ONNX Runtime 1.%u or newer, this is %s; upgrade onnxruntime", library,
                  needed, base->GetVersionString());
    return first.CreateStatus(static_cast<int>(kFail), static_cast<const char*>(message));
  }
  unsigned minor = 0;
  if (std::sscanf(base->GetVersionString(), "1.%u", &minor) == 1) Api::version = minor;
  const Api api(table);
  return guarded(api, "registration", [&] {
    // The session keeps a reference to the domain, so it lives as long as the process.
    OrtCustomOpDomain* domain = nullptr;
    check(api, api.CreateCustomOpDomain(domain_name, &domain));
    for (const OrtCustomOp* op : ops) check(api, api.CustomOpDomain_Add(domain, op));
    check(api, api.AddCustomOpDomain(options, domain));
  });
}

}  // namespace rq
