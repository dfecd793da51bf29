"""Pass: replaces root-mean-square norms, seven ops of torch's exporter, by ONNX Runtime's SimplifiedLayerNormalization.

Requires: nothing. Ensures: ``weight * (x * rsqrt(mean(x ** 2) + epsilon))`` over the last axis is one node.
"""

import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.match import match, numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import Match, NearMatch, PassReport

NAME = "rms_norms"
MEAN_SQUARE = ("ReduceMean", {"keepdims": 1}, ("Pow", "x", "exponent"), "axes")
NORM = ("Mul", "weight", ("Mul", "x", ("Reciprocal", ("Sqrt", ("Add", MEAN_SQUARE, "epsilon")))))


def rms_norms(graph: gs.Graph) -> PassReport:
    """Rewrite every norm of ``graph`` in place."""
    op, report = Ops(graph, NAME), PassReport("norms")
    for node in [node for node in graph.nodes if node.op == "Mul"]:
        (result,) = node.outputs
        if found := report.matched(_norm(result)):
            node.outputs.clear()
            (epsilon,) = numbers(found["epsilon"])
            op("SimplifiedLayerNormalization", found["x"], found["weight"], axis=-1, epsilon=epsilon, stash_type=1, out=result)
    graph.cleanup().toposort()
    left = [node for node in graph.nodes if node.op == "Mul" and isinstance(_norm(node.outputs[0]), dict)]
    ensures(NAME, not left, "that no norm is left in parts")
    return report


def _norm(result: gs.Tensor) -> Match | NearMatch | None:
    found = match(result, NORM)
    if found is None:
        return None
    if not isinstance(found["weight"], gs.Constant) or len(found["weight"].shape) != 1:
        return NearMatch("the weight is not a constant vector")
    for name, wanted in (("exponent", [2]), ("axes", [-1])):
        if (given := numbers(found[name])) != wanted:
            return NearMatch(f"{name} {given or 'computed'}")
    return found if len(numbers(found["epsilon"])) == 1 else NearMatch("epsilon is computed")
