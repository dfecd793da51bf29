// A layer from its fields to enqueue: a library for a test that has a CUDA driver, or what stands in for one.
#include "tensorrt_host.h"

using namespace host;

// Creates, configures and enqueues a layer; a wrong step's number, or 0. `workspace` gets `*workspace_bytes` of room, of which
// the plugin is given what it asks for; that many are returned in it.
extern "C" int rq_enqueue(const char* library, const int32_t* formats, const float* shares, int32_t slots, const char* activation,
                          float limit, const PluginTensorDesc* inputs, int32_t count, int64_t most_tokens,
                          const void* const* pointers, void* out, void* workspace, size_t* workspace_bytes) {
  auto fields = fields_of({formats, formats + slots}, activation);
  fields[0].data = formats;
  fields.emplace_back("limit", &limit, PluginFieldType::kFLOAT32, 1);
  if (shares) fields.emplace_back("shares", shares, PluginFieldType::kFLOAT32, slots);
  Plugin plugin(create(*open(library), fields));
  const auto failed = [](int step) {
    std::fprintf(stderr, "%s\n", logger.last.c_str());
    return step;
  };
  if (!plugin.held) return failed(1);
  std::vector<DynamicPluginTensorDesc> dynamic;
  for (int32_t i = 0; i < count; ++i) {
    DynamicPluginTensorDesc one{inputs[i], inputs[i].dims, inputs[i].dims, inputs[i].dims};
    if (i < 3) one.desc.dims.d[0] = -1, one.max.d[0] = most_tokens;
    dynamic.push_back(one);
  }
  if (configure(plugin, dynamic)) return failed(2);
  const size_t wanted = plugin.build().getWorkspaceSize(dynamic.data(), count, dynamic.data(), 1);
  if (wanted == 0 || wanted > *workspace_bytes) return failed(3);
  *workspace_bytes = wanted;
  Plugin attached(plugin.runtime().attachToContext(nullptr));
  if (attached.runtime().onShapeChange(inputs, count, inputs, 1)) return failed(4);
  if (attached.runtime().enqueue(inputs, inputs, pointers, &out, workspace, nullptr)) return failed(5);
  return 0;
}
