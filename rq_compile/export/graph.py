"""Takes the weights out of the exported graph and folds the constants around them.

No weight is read here. A tensor that would need one (a transposed copy of a projection) becomes a separate parameter, which is
read in that form when the weights file is written.
"""

import onnx_ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from torch import nn

from rq_compile.export.exported import Parameter
from rq_compile.rewrite.weights import LOCATION


def without_weights(graph: onnx_ir.Graph, model: nn.Module) -> dict[str, Parameter]:
    """Turn every initializer that stands for a meta tensor of ``model`` into external data. Returns initializer name ->
    parameter."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    parameters = {}
    for name, value in graph.initializers.items():
        if name in tensors and tensors[name].is_meta:
            parameters[name] = Parameter(name)
            value.const_value = _external(value, list(tensors[name].shape))
    return parameters


def folded(model: onnx_ir.Model, parameters: dict[str, Parameter]) -> tuple[onnx_ir.Model, dict[str, Parameter]]:
    """Fold constants and drop what is unused; returns the model and the parameters it still refers to."""
    model = passes.InlinePass()(model).model
    parameters = parameters | _transposed(model.graph, parameters)
    fold_constants(model, should_fold=lambda node: False if _reads_weights(node) else None)
    tidy = Sequential(
        passes.RemoveUnusedNodesPass(),
        # While constants are still nodes, equal ones are common subexpressions too.
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )
    model = tidy(model).model
    return model, {name: parameters[name] for name in model.graph.initializers if name in parameters}


def _transposed(graph: onnx_ir.Graph, parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """Replace every transpose of a weight matrix by an initializer of that form."""
    made = {}
    for node in [node for node in graph if node.op_type == "Transpose" and _reads_weights(node)]:
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        assert source.name in parameters
        assert source.shape is not None
        name = f"{source.name}.transposed"
        if name not in graph.initializers:
            made[name] = Parameter(source.name, transposed=True)
            value = onnx_ir.Value(name=name, type=source.type, shape=onnx_ir.Shape(source.shape.numpy()[::-1]))
            value.const_value = _external(value, source.shape.numpy()[::-1])
            graph.register_initializer(value)
        output.replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)
    return made


def _external(value: onnx_ir.Value, shape: list[int] | tuple[int, ...]) -> onnx_ir.ExternalTensor:
    assert value.dtype is not None
    return onnx_ir.ExternalTensor(LOCATION, 0, None, dtype=value.dtype, shape=onnx_ir.Shape(shape), name=value.name or "")


def _reads_weights(node: onnx_ir.Node) -> bool:
    return any(value is not None and isinstance(value.const_value, onnx_ir.ExternalTensor) for value in node.inputs)
