"""Pass: a Reshape to a shape that is computed from sizes of the batch takes it from a tensor that has this shape already.

The exporter computes such a shape from several sizes, for example to give the experts' outputs the shape of their inputs. Shapes
are those that it has declared: numbers, and names of sizes that depend on the batch.

Requires: nothing. Ensures: no Reshape computes a shape that a tensor before it has.
"""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport

NAME = "batch_shapes"


def batch_shapes(graph: gs.Graph) -> PassReport:
    """Rewrite ``graph`` in place. Its nodes are in topological order."""
    op, report = Ops(graph, NAME), PassReport("computed shapes", "read off another tensor")
    shapes: dict[int, gs.Tensor] = {}
    for node, like in list(_computed(graph)):
        if id(like) not in shapes:
            shapes[id(like)] = op("Shape", like)
        node.inputs[1] = shapes[id(like)]
        report.changed += 1
    graph.cleanup().toposort()
    ensures(NAME, not any(_computed(graph)), "that no shape is computed from sizes that a tensor has")
    return report


def _computed(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """Every Reshape with a computed shape, and the first tensor before it that has this shape."""
    first: dict[tuple[int | str, ...], gs.Tensor] = {}
    for node in graph.nodes:
        if node.op == "Reshape" and (like := first.get(_declared(node.outputs[0]))) and _is_computed(node.inputs[1]):
            yield node, like
        for tensor in node.outputs:
            if declared := _declared(tensor):
                first.setdefault(declared, tensor)


def _declared(tensor: gs.Tensor) -> tuple[int | str, ...]:
    """The shape of ``tensor``, which has at least two sizes that depend on the batch; empty otherwise."""
    shape = tensor.shape or ()
    named = [size for size in shape if isinstance(size, str)]
    return tuple(shape) if len(named) > 1 and None not in shape else ()


def _is_computed(shape: gs.Tensor) -> bool:
    return bool(shape.inputs) and shape.inputs[0].op != "Shape"
