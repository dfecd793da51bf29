// One SwiGLU MoE layer as llama.cpp computes it on the CPU: its operators, in the order of its graph, behind a few functions for
// llama_cpp_layer.py. Every array is contiguous, its last axis the fastest.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string_view>
#include <utility>

namespace {

template <auto release>
struct Release {
  template <typename Type>
  void operator()(Type* owned) const {
    release(owned);
  }
};

using Backend = std::unique_ptr<ggml_backend, Release<ggml_backend_free>>;
using Buffer = std::unique_ptr<ggml_backend_buffer, Release<ggml_backend_buffer_free>>;
using Context = std::unique_ptr<ggml_context, Release<ggml_free>>;
using GraphMemory = std::unique_ptr<ggml_gallocr, Release<ggml_gallocr_free>>;
using Threads = std::unique_ptr<ggml_threadpool, Release<ggml_threadpool_free>>;

constexpr size_t kTensors = 256;  // more than a graph of 64 experts a token has

Context new_context() {
  return Context(ggml_init({ggml_tensor_overhead() * kTensors + ggml_graph_overhead(), nullptr, /*no_alloc=*/true}));
}

struct Graph {
  Context context = new_context();
  GraphMemory memory;
  ggml_cgraph* nodes;
  int64_t tokens;
  ggml_tensor *x, *ids, *gates, *y;
};

}  // namespace

struct Layer {
  Backend backend{ggml_backend_cpu_init()};
  Threads threads;
  Context context = new_context();
  ggml_tensor *gate, *linear, *down;
  Buffer weights;
  int64_t top_k;
  std::unique_ptr<Graph> graph;
};

namespace {

void warn(ggml_log_level level, const char* text, void*) {
  if (level >= GGML_LOG_LEVEL_WARN) std::fputs(text, stderr);
}

Threads sleeping_threads(int count) {
  ggml_threadpool_params params = ggml_threadpool_params_default(count);
  params.poll = 0;
  return Threads(ggml_threadpool_new(&params));
}

// The memory that llama.cpp would choose for these weights: one that lays them out anew for its kernels, where there is one.
ggml_backend_buffer_type_t memory_for(ggml_backend_dev_t device, ggml_tensor* weights, int64_t top_k) {
  const auto others = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  const Context context = new_context();
  ggml_tensor* x = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, weights->ne[0], top_k, 8);
  ggml_tensor* product = ggml_mul_mat_id(context.get(), weights, x, ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, top_k, 8));
  for (ggml_backend_buffer_type_t* other = others ? others(device) : nullptr; other && *other; ++other) {
    const Buffer empty(ggml_backend_buft_alloc_buffer(*other, 0));
    weights->buffer = empty.get();
    const bool supported = ggml_backend_dev_supports_op(device, product);
    weights->buffer = nullptr;
    if (supported) return *other;
  }
  return ggml_backend_dev_buffer_type(device);
}

std::unique_ptr<Graph> graph_of(const Layer& layer, int64_t tokens) {
  auto graph = std::make_unique<Graph>();
  ggml_context* context = graph->context.get();
  const int64_t hidden = layer.gate->ne[0], top_k = layer.top_k;
  graph->tokens = tokens;
  graph->nodes = ggml_new_graph(context);
  graph->x = ggml_new_tensor_3d(context, GGML_TYPE_F32, hidden, 1, tokens);
  graph->ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, top_k, tokens);
  graph->gates = ggml_new_tensor_3d(context, GGML_TYPE_F32, 1, top_k, tokens);
  for (ggml_tensor* input : {graph->x, graph->ids, graph->gates}) ggml_set_input(input);

  ggml_tensor* linear = ggml_mul_mat_id(context, layer.linear, graph->x, graph->ids);
  ggml_tensor* gate = ggml_mul_mat_id(context, layer.gate, graph->x, graph->ids);
  ggml_tensor* rows = ggml_mul_mat_id(context, layer.down, ggml_swiglu_split(context, gate, linear), graph->ids);
  rows = ggml_mul(context, rows, graph->gates);
  const auto choice = [&](int64_t i) { return ggml_view_2d(context, rows, hidden, tokens, rows->nb[2], i * rows->nb[1]); };
  graph->y = choice(0);
  for (int64_t i = 1; i < top_k; ++i) graph->y = ggml_add(context, graph->y, choice(i));
  graph->y = ggml_cont(context, graph->y);
  ggml_set_output(graph->y);
  ggml_build_forward_expand(graph->nodes, graph->y);

  graph->memory.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(layer.backend.get())));
  return ggml_gallocr_alloc_graph(graph->memory.get(), graph->nodes) ? std::move(graph) : nullptr;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// `format` names a type of ggml ("f32", "q8_0", "q4_0"). Null where ggml does not know it or has no memory.
EXPORT Layer* layer_new(const char* format, int64_t hidden, int64_t intermediate, int64_t experts, int64_t top_k, int threads) {
  int type = 0;
  while (type < GGML_TYPE_COUNT && std::string_view(ggml_type_name(static_cast<ggml_type>(type))) != format) ++type;
  if (type == GGML_TYPE_COUNT) return nullptr;

  ggml_log_set(warn, nullptr);
  auto layer = std::make_unique<Layer>();
  const auto matrices = [&](int64_t columns, int64_t rows) {
    return ggml_new_tensor_3d(layer->context.get(), static_cast<ggml_type>(type), columns, rows, experts);
  };
  layer->gate = ggml_set_name(matrices(hidden, intermediate), "gate");
  layer->linear = ggml_set_name(matrices(hidden, intermediate), "linear");
  layer->down = ggml_set_name(matrices(intermediate, hidden), "down");
  layer->top_k = top_k;
  layer->threads = sleeping_threads(threads);
  ggml_backend_cpu_set_n_threads(layer->backend.get(), threads);
  ggml_backend_cpu_set_threadpool(layer->backend.get(), layer->threads.get());
  ggml_backend_buffer_type_t memory = memory_for(ggml_backend_get_device(layer->backend.get()), layer->gate, top_k);
  layer->weights.reset(ggml_backend_alloc_ctx_tensors_from_buft(layer->context.get(), memory));
  return layer->weights ? layer.release() : nullptr;
}

// One matrix of all experts, in blocks of the format: "gate" or "linear" [experts, intermediate, hidden], or "down" [experts,
// hidden, intermediate].
EXPORT void layer_set(Layer* layer, const char* name, const void* data) {
  ggml_tensor* matrix = ggml_get_tensor(layer->context.get(), name);
  ggml_backend_tensor_set(matrix, data, 0, ggml_nbytes(matrix));
}

// y [tokens, hidden] of x [tokens, hidden], ids [tokens, top_k] and gates [tokens, top_k]; false where ggml fails.
EXPORT bool layer_run(Layer* layer, int64_t tokens, const float* x, const int32_t* ids, const float* gates, float* y) {
  if (!layer->graph || layer->graph->tokens != tokens) layer->graph = graph_of(*layer, tokens);
  if (!layer->graph) return false;
  const Graph& graph = *layer->graph;
  ggml_backend_tensor_set(graph.x, x, 0, ggml_nbytes(graph.x));
  ggml_backend_tensor_set(graph.ids, ids, 0, ggml_nbytes(graph.ids));
  ggml_backend_tensor_set(graph.gates, gates, 0, ggml_nbytes(graph.gates));
  if (ggml_backend_graph_compute(layer->backend.get(), graph.nodes) != GGML_STATUS_SUCCESS) return false;
  ggml_backend_tensor_get(graph.y, y, 0, ggml_nbytes(graph.y));
  return true;
}

EXPORT void layer_free(Layer* layer) { delete layer; }
