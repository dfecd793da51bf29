#include "log.h"

#include <atomic>
#include <cstdio>

namespace rq {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

void log_error(const std::string& message) noexcept {
  try {
    const std::string line = "rq.moe MoeLayer: " + message;
    nvinfer1::ILoggerFinder* finder = logger_finder;
    nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
    if (logger) logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    else std::fprintf(stderr, "%s\n", line.c_str());
  } catch (...) { std::fputs("rq.moe MoeLayer: an error that could not be told\n", stderr); }
}

}  // namespace rq
