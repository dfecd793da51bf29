"""Pass: replaces rotary position embeddings by ONNX Runtime's RotaryEmbedding, which rotates heads in the projection's layout.

The exporter writes ``x * cos + rotate_half(x) * sin`` in nine ops, on x as [batch, heads, sequence, dimension]. The op takes
[batch, sequence, heads * dimension], so it comes before that transpose. It reads cos and sin from a table by position. Here, the
table has one row for each token of the batch, and the position is the token's number, so all positions are exact.

Requires: nothing. Ensures: heads that are rotated as a whole, with one half against the other, are rotated by one node.
"""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.match import TO_THE_END, Pattern, match, numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import Match, NearMatch, PassReport

NAME = "rotary_embeddings"
SWAP_HEADS = [0, 2, 1, 3]
HEADS = ("Transpose", {"perm": SWAP_HEADS}, "by_token")
LATTER, FORMER = ("Slice", "x", "middle", "end", "axis", "step"), ("Slice", "x", "start", "stop", "axis_too", "step_too")
ROTATED = ("Add", ("Mul", "x", "cos"), ("Mul", ("Concat", {"axis": -1}, ("Neg", LATTER), FORMER), "sin"))


def _of_angle(function: str) -> Pattern:
    return ("Unsqueeze", ("Mul", (function, ("Concat", {"axis": -1}, "angle", "angle")), "scaling"), "heads_axis")


def rotary_embeddings(graph: gs.Graph) -> PassReport:
    """Rewrite every rotation of ``graph`` in place."""
    op, report = Ops(graph, NAME), PassReport("rotations")
    tables: dict[int, list[gs.Tensor]] = {}
    for node in [node for node in graph.nodes if node.op == "Add"]:
        (result,) = node.outputs
        if found := report.matched(_rotation(result)):
            node.outputs.clear()
            batch, heads, tokens, dimension = found["x"].shape
            angle = found["angle"]
            if id(angle) not in tables:
                tables[id(angle)] = _tables(op, angle, numbers(found["scaling"])[0])
            turned = op("RotaryEmbedding", merged_heads(op, found["by_token"]), *tables[id(angle)], domain="com.microsoft")
            turned.shape, turned.dtype = [batch, tokens, heads * dimension], result.dtype
            op("Transpose", op("Reshape", turned, [0, 0, heads, dimension]), perm=SWAP_HEADS, out=result)
    graph.cleanup().toposort()
    left = [node for node in graph.nodes if node.op == "Add" and isinstance(_rotation(node.outputs[0]), dict)]
    ensures(NAME, not left, "that no rotation is left")
    return report


def merged_heads(op: Ops, by_token: gs.Tensor) -> gs.Tensor:
    """``[batch, sequence, heads * dimension]``, from ``[batch, sequence, heads, dimension]``."""
    split = match(by_token, ("Reshape", "merged", "shape"))
    if split and len(split["merged"].shape or []) == 3:
        return split["merged"]
    return op("Reshape", by_token, [0, 0, -1])


def _rotation(result: gs.Tensor) -> Match | NearMatch | None:
    found = match(result, ROTATED)
    if found is None:
        return None
    heads, cos, sin = match(found["x"], HEADS), match(found["cos"], _of_angle("Cos")), match(found["sin"], _of_angle("Sin"))
    if heads is None:
        return NearMatch("what is rotated is not a transpose of heads")
    if cos is None or sin is None or cos["angle"] is not sin["angle"]:
        return NearMatch("cos and sin are not of one angle")
    x, angle = found["x"].shape or [], cos["angle"].shape or []
    if len(x) != 4 or not isinstance(x[1], int) or not isinstance(x[3], int) or angle != [x[0], x[2], x[3] // 2]:
        return NearMatch(f"x {x} has angles {angle}")
    bounds = [numbers(found[name]) for name in ("start", "stop", "middle", "end", "axis", "axis_too", "step", "step_too")]
    halves = bounds == [[0], [x[3] // 2], [x[3] // 2], [TO_THE_END], [3], [3], [1], [1]]
    if not halves:
        return NearMatch(f"the halves end at {bounds[1]} and start at {bounds[2]} of {x[3]}")
    alike = numbers(cos["heads_axis"]) == numbers(sin["heads_axis"]) == [1] and numbers(cos["scaling"]) == numbers(sin["scaling"])
    if not alike or len(numbers(cos["scaling"])) != 1:
        return NearMatch(f"cos is scaled by {numbers(cos['scaling'])} and sin by {numbers(sin['scaling'])}")
    return {**found, **heads, **cos}


def _tables(op: Ops, angle: gs.Tensor, scaling: float) -> list[gs.Tensor]:
    """Each token's number, int64 ``[batch, sequence]``, its cos and its sin, both fp32 ``[batch * sequence, dimension / 2]``."""
    shape = op("Shape", angle, end=2)
    number = op("Reshape", op("Range", 0, op("ReduceProd", shape, keepdims=0), 1), shape)
    by_token = op("Reshape", angle, [-1, angle.shape[2]])
    cos_and_sin = [op(function, by_token) for function in ("Cos", "Sin")]
    if scaling != 1:
        cos_and_sin = [op("Mul", table, np.float32(scaling)) for table in cos_and_sin]
    return [number, *cos_and_sin]
