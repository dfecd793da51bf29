"""Pass: int4 weights that a product in a loop shares with the main graph are prevented from being fused into that product.

TensorRT-RTX 1.7 can compile a product with int4 weights only in the main graph: if a loop has a second product with the same
weights, with the gather and the activation of an expert around it, the code generator fails. With two transposes, the loop writes
its weights out in 16 bits; multiplying them by the loop's condition, which is 1 whenever the body runs, keeps this inside of the
loop.

Requires: nothing. Ensures: no MatMul in a loop reads a DequantizeLinear of int4; no numbers change.
"""

import onnx
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.weights import INT4

NAME = "loop_weights"
SWAPPED = [0, 2, 1]


def loop_weights(graph: gs.Graph) -> PassReport:
    """Rewrite every Loop of the main graph in place."""
    report = PassReport("int4 products in loops", "kept apart")
    bodies = [node.attrs["body"] for node in graph.nodes if node.op == "Loop"]
    for body in bodies:
        report.changed += _keep_apart(body)
    ensures(NAME, not any(map(_products, bodies)), "that no loop multiplies by int4 weights")
    return report


def _products(body: gs.Graph) -> list[gs.Node]:
    """The MatMul whose weights are a DequantizeLinear of int4 outside of the loop."""
    inside = {id(node) for node in body.nodes}
    return [
        node
        for node in body.nodes
        if node.op == "MatMul" and any(_of_int4(maker) and id(maker) not in inside for maker in node.inputs[1].inputs)
    ]


def _of_int4(node: gs.Node) -> bool:
    return node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant) and node.inputs[0].dtype == INT4


def _keep_apart(body: gs.Graph) -> int:
    products = _products(body)
    one = gs.Variable(f"{body.name}/one")
    # The loop's condition is an input of its body, behind the iteration's number.
    nodes = [gs.Node("Cast", one.name, {"to": onnx.TensorProto.FLOAT}, [body.inputs[1]], [one])]
    for node in body.nodes:
        if any(node is product for product in products):
            across, times_one, back = (gs.Variable(f"{node.name}.weights_{step}") for step in ("across", "times_one", "back"))
            nodes += [
                gs.Node("Transpose", across.name, {"perm": SWAPPED}, [node.inputs[1]], [across]),
                gs.Node("Mul", times_one.name, {}, [across, one], [times_one]),
                gs.Node("Transpose", back.name, {"perm": SWAPPED}, [times_one], [back]),
            ]
            node.inputs[1] = back
        nodes.append(node)
    body.nodes = nodes
    return len(products)
