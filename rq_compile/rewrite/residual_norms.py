"""Pass: a residual sum and the norm that reads it become ONNX Runtime's SkipSimplifiedLayerNormalization, which returns both.

Requires: norms as ``rms_norms`` writes them. Ensures: no such norm reads a sum of two tensors of its own shape.
"""

import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.report import PassReport

NAME = "residual_norms"
NORM = "SimplifiedLayerNormalization"


def residual_norms(graph: gs.Graph) -> PassReport:
    """Rewrite every such sum of ``graph`` in place; of several norms of one sum, the first takes it."""
    report = PassReport("residual sums", "fused with norms")
    for node in [node for node in graph.nodes if _is_residual(node)]:
        total = node.outputs[0]
        norm = next(reader for reader in total.outputs if reader.op == NORM)
        operands, results = [*node.inputs, norm.inputs[1]], list(norm.outputs)
        node.outputs.clear()
        norm.inputs.clear()
        norm.outputs.clear()
        if total.outputs or any(total is tensor for tensor in graph.outputs):
            results += [gs.Variable.empty(), gs.Variable.empty(), total]
        attributes = {"epsilon": norm.attrs["epsilon"]}
        graph.nodes.append(gs.Node(f"Skip{NORM}", f"{NAME}/{norm.name}", attributes, operands, results, domain="com.microsoft"))
        report.changed += 1
    graph.cleanup().toposort()
    ensures(NAME, not any(map(_is_residual, graph.nodes)), "that no norm reads a residual sum")
    return report


def _is_residual(node: gs.Node) -> bool:
    if node.op != "Add" or not any(reader.op == NORM for reader in node.outputs[0].outputs):
        return False
    shapes = [tensor.shape for tensor in (*node.inputs, *node.outputs)]
    return all(shape is not None and len(shape) == 3 and shape == shapes[0] for shape in shapes)
