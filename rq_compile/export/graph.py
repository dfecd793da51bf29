"""The exported graph's weights taken out, and its constants folded around them."""

import numpy as np
import onnx_ir
from onnxscript.optimizer import optimize
from torch import nn

from rq_compile.architectures.dense import dense_tensor
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.rewrite.weights import LOCATION


def without_weights(graph: onnx_ir.Model, checkpoint: Checkpoint, model: nn.Module) -> None:
    """Let every initializer that stands for a meta tensor of ``model`` be read from the checkpoint, if and when a pass asks."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, value in graph.graph.initializers.items():
        if name in tensors and tensors[name].is_meta:
            assert value.const_value is not None
            value.const_value = _lazy(checkpoint, name, value.const_value)


def _lazy(checkpoint: Checkpoint, name: str, like: onnx_ir.TensorProtocol) -> onnx_ir.LazyTensor:
    def read() -> onnx_ir.Tensor:
        return onnx_ir.Tensor(dense_tensor(checkpoint, name).astype(np.float32), name=name)

    return onnx_ir.LazyTensor(read, dtype=like.dtype, shape=onnx_ir.Shape(like.shape.numpy()), name=name)


def optimized(graph: onnx_ir.Model) -> tuple[onnx_ir.Model, set[str]]:
    """Fold constants and drop what is unused.

    Returns the graph, and the names of the initializers that no pass has replaced by a constant: they are external data now.
    """
    graph = optimize(graph)
    parameters = set()
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, onnx_ir.LazyTensor):
            parameters.add(name)
            value.const_value = onnx_ir.ExternalTensor(
                LOCATION, 0, tensor.nbytes, dtype=tensor.dtype, shape=tensor.shape, name=name
            )
    return graph, parameters
