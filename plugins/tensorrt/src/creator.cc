// The functions with which TensorRT gets the library's creators.
#include <NvInferRuntime.h>

#include "fields.h"
#include "log.h"
#include "moe_layer.h"

namespace {

using namespace nvinfer1;

class MoeLayerCreator final : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
    return rq::guarded<IPluginV3*>(nullptr, [&] { return new rq::MoeLayer(rq::parse_fields(fields)); });
  }
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  AsciiChar const* getPluginName() const noexcept override { return rq::kPluginName; }
  AsciiChar const* getPluginVersion() const noexcept override { return rq::kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return rq::kPluginNamespace; }

 private:
  const std::array<PluginField, rq::kFieldCount> names_ = rq::field_names();
  const PluginFieldCollection collection_{rq::kFieldCount, names_.data()};
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static MoeLayerCreator creator;
  static IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

__attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* finder) { rq::set_logger_finder(finder); }

}  // extern "C"
