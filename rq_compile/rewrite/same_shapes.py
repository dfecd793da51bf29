"""Pass: removes each Reshape to the shape that its input has. A node costs about a microsecond, whatever it does.

Shapes are those that the exporter and the passes have declared: numbers, and names of sizes that depend on the batch.

Requires: nothing. Ensures: no Reshape has the same declared shape before and after.
"""

import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.report import PassReport

NAME = "same_shapes"


def same_shapes(graph: gs.Graph) -> PassReport:
    """Rewrite ``graph`` in place."""
    report = PassReport("reshapes to the same shape", "removed")
    for node in [node for node in graph.nodes if _changes_nothing(node, graph)]:
        (result,) = node.outputs
        for reader in list(result.outputs):
            reader.inputs = [node.inputs[0] if tensor is result else tensor for tensor in reader.inputs]
        report.changed += 1
    graph.cleanup().toposort()
    left = [node for node in graph.nodes if _changes_nothing(node, graph)]
    ensures(NAME, not left, "that no reshape leaves a shape as it is")
    return report


def _changes_nothing(node: gs.Node, graph: gs.Graph) -> bool:
    if node.op != "Reshape" or any(node.outputs[0] is tensor for tensor in graph.outputs):
        return False
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return bool(before) and before == after and None not in before
