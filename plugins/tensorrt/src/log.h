// No exception passes through TensorRT's interfaces: errors are logged, and the return value indicates the failure.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace rq {

void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// Logs to TensorRT's logger, or to stderr if there is none.
void log_error(const std::string& message) noexcept;

// Returns what `body` returns, or `failed` if it throws.
template <typename Result, typename Body>
Result guarded(Result failed, Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) { log_error(error.what()); } catch (...) {
    log_error("an unknown error");
  }
  return failed;
}

}  // namespace rq
