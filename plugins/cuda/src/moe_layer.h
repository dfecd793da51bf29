// A MoE layer as one op of ONNX Runtime's CUDA provider.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "node.h"
#include "op.h"

namespace rq {

class MoeLayer {
 public:
  // Throws if this library has no kernels for a layer with the node's attributes, inputs and shapes, as far as the graph knows
  // the shapes.
  explicit MoeLayer(const Info& info);

  // Queues the layer's launches on the node's stream. Several threads may call it at once. The first call with a shape loads the
  // kernels.
  void compute(const Context& context);

 private:
  struct Prepared {
    std::vector<TensorDescription> inputs;  // the number of tokens left open
    Layer layer;
    LayerKernels kernels;
  };
  std::shared_ptr<const Prepared> prepared_for(std::vector<TensorDescription> inputs);

  const Fields fields_;
  std::vector<Input> list_;
  std::mutex mutex_;
  std::shared_ptr<const Prepared> prepared_;
};

// One op for both types of x, with one name.
std::vector<const OrtCustomOp*> moe_layer_ops();

// ONNX Runtime requests shapes without passing its API table.
void set_shape_inference_api(const OrtApi* table);

}  // namespace rq
