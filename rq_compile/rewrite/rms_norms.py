"""Pass: a root-mean-square norm, seven ops of torch's exporter, becomes ONNX Runtime's SimplifiedLayerNormalization.

Requires: nothing. Ensures: ``weight * (x * rsqrt(mean(x ** 2) + epsilon))`` over the last axis is one node.
"""

import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.match import match, numbers
from rq_compile.rewrite.ops import Ops

NAME = "rms_norms"
MEAN_SQUARE = ("ReduceMean", {"keepdims": 1}, ("Pow", "x", "exponent"), "axes")
NORM = ("Mul", "weight", ("Mul", "x", ("Reciprocal", ("Sqrt", ("Add", MEAN_SQUARE, "epsilon")))))


def rms_norms(graph: gs.Graph) -> None:
    """Rewrite every norm of ``graph`` in place."""
    op = Ops(graph, NAME)
    for node in [node for node in graph.nodes if node.op == "Mul"]:
        (result,) = node.outputs
        if found := _norm(result):
            node.outputs.clear()
            (epsilon,) = numbers(found["epsilon"])
            op("SimplifiedLayerNormalization", found["x"], found["weight"], axis=-1, epsilon=epsilon, stash_type=1, out=result)
    graph.cleanup().toposort()
    ensures(NAME, not any(_norm(node.outputs[0]) for node in graph.nodes if node.op == "Mul"), "that no norm is left in parts")


def _norm(result: gs.Tensor) -> dict[str, gs.Tensor] | None:
    found = match(result, NORM)
    if found is None or not isinstance(found["weight"], gs.Constant) or len(found["weight"].shape) != 1:
        return None
    exact = numbers(found["exponent"]) == [2] and numbers(found["axes"]) == [-1] and len(numbers(found["epsilon"])) == 1
    return found if exact else None
