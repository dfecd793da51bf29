// Nothing is thrown through TensorRT's interfaces: what goes wrong is logged, and a value says that it did.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace rq {

void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// To TensorRT's logger, or stderr where there is none.
void log_error(const std::string& message) noexcept;

// What `body` returns, or `failed` if it throws.
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
