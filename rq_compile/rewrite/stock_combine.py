"""Pass: Combine in standard ops.

Requires: nothing. Ensures: no Combine node is left; the choices of a token are summed in their order.
"""

import onnx
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport

NAME = "stock_combine"


def stock_combine(graph: gs.Graph) -> PassReport:
    """Rewrite every Combine of ``graph`` in place."""
    report = PassReport("Combine nodes", "in standard ops")
    for node in [node for node in graph.nodes if node.op == "Combine" and node.domain == DOMAIN]:
        slot_outputs, rows, gates, *constants = node.inputs
        (y,) = node.outputs
        node.outputs.clear()
        graph.nodes.remove(node)
        op = Ops(graph, node.name)
        pairs = op("Shape", rows)
        position = op("Range", 0, op("Squeeze", pairs), 1)
        inverse = op("ScatterElements", position, rows, position, axis=0)
        if constants:
            slot_outputs, inverse = _with_constants(op, slot_outputs, inverse, *constants)
        by_pair = op("Gather", slot_outputs, inverse)
        width = op("Shape", slot_outputs, start=1)
        by_choice = op("Reshape", by_pair, op("Concat", op("Shape", gates), width, axis=0), allowzero=1)
        op("ReduceSum", op("Mul", by_choice, op("Unsqueeze", gates, [2])), [1], keepdims=0, out=y)
        report.changed += 1
    ensures(NAME, not any(node.op == "Combine" for node in graph.nodes), "that no Combine node is left")
    return report


def _with_constants(
    op: Ops, slot_outputs: gs.Tensor, row: gs.Tensor, ids: gs.Tensor, places: gs.Tensor, outputs: gs.Tensor
) -> tuple[gs.Tensor, gs.Tensor]:
    """``slot_outputs`` followed by the ``outputs`` of constant experts, and the row of each pair in both."""
    place = op("Cast", op("Gather", places, op("Reshape", ids, [-1])), to=onnx.TensorProto.INT64)
    behind = op("Add", place, op("Shape", slot_outputs, start=0, end=1))
    return op("Concat", slot_outputs, outputs, axis=0), op("Where", op("Less", place, 0), row, behind)
