"""Pass: int4 weights that a product in a loop shares with the main graph are prevented from being fused into that product.

TensorRT-RTX 1.7 can compile a product with int4 weights only in the main graph: if a loop has a second product with the same
weights, with the gather and the activation of an expert around it, the code generator fails. With two transposes, the loop writes
its weights out in 16 bits; multiplying them by the loop's condition, which is 1 whenever the body runs, keeps this inside of the
loop.

Requires: nothing. Ensures: no MatMul in a loop reads a DequantizeLinear of int4; no numbers change.
"""

import onnx
from onnx import GraphProto, TensorProto, helper

NAME = "loop_weights"
SWAPPED = [0, 2, 1]


def loop_weights(model: onnx.ModelProto) -> None:
    """Rewrite every Loop of the main graph in place."""
    int4 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4}
    matrices = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in int4}
    for node in model.graph.node:
        if node.op_type == "Loop":
            (body,) = (attribute.g for attribute in node.attribute if attribute.name == "body")
            _keep_apart(body, matrices)


def _keep_apart(body: GraphProto, matrices: set[str]) -> None:
    nodes = list(body.node)
    del body.node[:]
    one = f"{body.name}/one"
    # The loop's condition is an input of its body, behind the iteration's number.
    body.node.append(helper.make_node("Cast", [body.input[1].name], [one], one, to=TensorProto.FLOAT))
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            across, times_one, back = (f"{node.name}.weights_{step}" for step in ("across", "times_one", "back"))
            body.node.append(helper.make_node("Transpose", [node.input[1]], [across], across, perm=SWAPPED))
            body.node.append(helper.make_node("Mul", [across, one], [times_one], times_one))
            body.node.append(helper.make_node("Transpose", [times_one], [back], back, perm=SWAPPED))
            node.input[1] = back
        body.node.append(node)
