"""Finds attention over a cache, as torch's exporter and transformers write it, for the passes that replace it by one op."""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.rewrite.match import Pattern, match, numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import Match, NearMatch
from rq_compile.rewrite.rotary_embeddings import HEADS, SWAP_HEADS

TRANSPOSED = ("Reshape", ("Transpose", {"perm": [0, 2, 1]}, ("Reshape", "keys", "matrices")), "transposed")
# Of scaled_dot_product_attention, and of transformers' own attention.
SCORES: tuple[Pattern, ...] = (
    ("Add", ("MatMul", ("Mul", "query", "query_scale"), ("Mul", TRANSPOSED, "key_scale")), "mask"),
    ("Add", ("Mul", ("MatMul", "query", ("Transpose", {"perm": [0, 1, 3, 2]}, "keys")), "query_scale"), "mask"),
)
# A mask from which an indexer excludes further columns.
NARROWED: Pattern = ("Where", "excluded", "lowest", "mask")
# A mask of 0, where a column may be read, and the lowest number.
MASKS: tuple[Pattern, ...] = (("Mul", ("Cast", ("Not", "allowed")), "lowest"), ("Where", "allowed", "zero", "lowest"))
# A number up to this one excludes a column, whatever its score is.
EXCLUDES = -1e30
# What reads the scores for the softmax alone.
OF_A_SOFTMAX = {"Softmax", "Sub", "ReduceMax", "Concat", "Shape"}
# Rows that may read nothing are set to 0.
GUARDED = ("Reshape", ("Where", "nothing", "zeros", "product"), "shape")
# The cache with the new tokens, as the exporter writes it; the axis is 2 or -2.
APPENDED = ("Concat", "past", "new")


def softmax_attention(node: gs.Node) -> Match | NearMatch | None:
    """The tensors of an attention whose last product is ``node``: ``query``, ``keys`` and ``values`` of all heads, what is
    ``allowed`` and what of that is ``excluded``, the ``result``, the scales, and ``sinks`` if there are any."""
    weights, values = node.inputs
    found = _scores(weights)
    if found is None:
        return None
    if others := {node.op for node in found["scores"].outputs} - OF_A_SOFTMAX:
        return NearMatch(f"its scores are read by {', '.join(sorted(others))}")
    read = _read(found["mask"])
    if read is None:
        return NearMatch("its mask is not made of booleans")
    if any(mask.shape[1] != 1 for mask in read.values()):
        return NearMatch("each head has its own mask")
    return {**found, **read, "values": values, "result": _guarded(node.outputs[0])}


def unknown(found: Match) -> NearMatch | None:
    """What is not known of an attention: its scale, or the shape of its query."""
    if len(numbers(found["query_scale"])) != 1 or len(numbers(found.get("key_scale", found["query_scale"]))) != 1:
        return NearMatch("its scale is not known")
    if len(found["query"].shape or []) != 4 or not isinstance(found["query"].shape[1], int):
        return NearMatch(f"its query has the shape {found['query'].shape}")
    return None


def mask_of(op: Ops, found: Match) -> gs.Tensor:
    """bool ``[batch, 1, sequence, tokens]``: the columns that are read."""
    if "excluded" not in found:
        return found["allowed"]
    mask: gs.Tensor = op("And", found["allowed"], op("Not", found["excluded"]))
    return mask


def scale_of(found: Match) -> float:
    return float(np.prod([numbers(found[name])[0] for name in ("query_scale", "key_scale") if name in found]))


def _scores(weights: gs.Tensor) -> Match | None:
    """``query``, ``keys``, ``mask`` and the scales of a softmax, its ``scores``, and ``sinks``: logits of its sum alone."""
    cut = weights.inputs[0] if weights.inputs and weights.inputs[0].op == "Slice" else None
    if cut is not None:
        weights = cut.inputs[0]
    if converted := match(weights, ("Cast", "x")):
        weights = converted["x"]
    # Without its largest number, a softmax is the same.
    softmax = match(weights, ("Softmax", {"axis": -1}, ("Sub", "x", ("ReduceMax", "x"))))
    softmax = softmax or match(weights, ("Softmax", {"axis": -1}, "x"))
    if softmax is None:
        return None
    sinks = match(softmax["x"], ("Concat", {"axis": -1}, "x", ("Expand", "sinks", "shape")))
    if (sinks is None) != (cut is None) or (
        cut is not None and [numbers(bound) for bound in cut.inputs[1:4]] != [[0], [-1], [3]]
    ):
        return None
    scores = sinks["x"] if sinks else softmax["x"]
    found = next((found for pattern in SCORES if (found := match(scores, pattern))), None)
    return found and {**found, "scores": scores, **({"sinks": sinks["sinks"]} if sinks else {})}


def _read(mask: gs.Tensor) -> Match | None:
    """bool ``[batch, heads, sequence, tokens]``: ``allowed`` are the columns that ``mask`` leaves as they are, without those that
    are ``excluded``, if there are any."""
    narrowed = match(mask, NARROWED)
    if narrowed and _excludes(narrowed["lowest"]):
        found = _read(narrowed["mask"])
        alone = found is not None and "excluded" not in found and len(narrowed["excluded"].shape or []) == 4
        return {**found, "excluded": narrowed["excluded"]} if found and alone else None
    found = next((found for pattern in MASKS if (found := match(mask, pattern))), None)
    if found is None or len(found["allowed"].shape or []) != 4:
        return None
    zero = numbers(found["zero"]) if "zero" in found else [0]
    return {"allowed": found["allowed"]} if zero == [0] and _excludes(found["lowest"]) else None


def _excludes(number: gs.Tensor) -> bool:
    lowest = numbers(number)
    return len(lowest) == 1 and lowest[0] <= EXCLUDES


def _guarded(product: gs.Tensor) -> gs.Tensor:
    """``product``, or what replaces its rows that read nothing."""
    for guard in product.outputs:
        for reshape in guard.outputs[0].outputs if guard.op == "Where" else ():
            found = match(reshape.outputs[0], GUARDED) if reshape.op == "Reshape" else None
            if found and found["product"] is product:
                result: gs.Tensor = reshape.outputs[0]
                return result
    return product


def appended(cache: gs.Tensor, graph: gs.Graph) -> Match | None:
    """``past`` and ``new`` if ``cache`` is an input of the graph with the new tokens, and an output that is read once, apart from
    its shape."""
    found = match(cache, APPENDED)
    of_graph = found is not None and any(found["past"] is tensor for tensor in graph.inputs)
    appends = of_graph and cache.inputs[0].attrs["axis"] in (2, -2) and any(cache is tensor for tensor in graph.outputs)
    alone = sum(node.op != "Shape" for node in cache.outputs) == 1
    return found if appends and alone and len(found["past"].shape) == 4 else None  # type: ignore[index]


def by_token(op: Ops, by_head: gs.Tensor) -> gs.Tensor:
    """``[batch, sequence, heads, dimension]``, from ``[batch, heads, sequence, dimension]``."""
    found = match(by_head, HEADS)
    return found["by_token"] if found else op("Transpose", by_head, perm=SWAP_HEADS)


def read_by_token(op: Ops, by_head: gs.Tensor, y: gs.Tensor, heads: int, dimension: int) -> None:
    """Let every reader of ``by_head [batch, heads, sequence, dimension]`` read ``y [batch, sequence, heads * dimension]``."""
    split = [0, 0, heads, dimension]
    if by_head.shape is not None:
        y.shape, y.dtype = [by_head.shape[0], by_head.shape[2], heads * dimension], by_head.dtype
    for swap in [node for node in by_head.outputs if node.op == "Transpose" and node.attrs["perm"] == SWAP_HEADS]:
        (by_token,) = swap.outputs
        swap.inputs.clear()
        swap.outputs.clear()
        for merge in [node for node in by_token.outputs if node.op == "Reshape"]:
            merge.inputs[0] = y
        if by_token.outputs:
            op("Reshape", y, split, out=by_token)
    if by_head.outputs:
        op("Transpose", op("Reshape", y, split), perm=SWAP_HEADS, out=by_head)
