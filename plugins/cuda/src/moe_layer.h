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
  // Throws if the node's attributes, inputs or, where the graph knows them, shapes are not those of a layer that this library
  // has kernels for.
  explicit MoeLayer(const Info& info);

  // Queues the layer's launches on the node's stream; may be called by several threads at once. The first call of a shape
  // loads the kernels.
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

// For both types of x, under one name.
std::vector<const OrtCustomOp*> moe_layer_ops();

// ONNX Runtime asks for shapes without saying by which table to answer.
void set_shape_inference_api(const OrtApi* table);

}  // namespace rq
