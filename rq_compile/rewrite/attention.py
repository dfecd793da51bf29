"""Pass: attention in separate ops becomes CacheAttention, which appends the new keys and values to the cache itself.

torch's ``scaled_dot_product_attention`` is exported as about twenty ops, which copy and transpose the keys of all previous tokens
for each new token; transformers' own attention, for models with attention sinks, as about ten. The op reads keys and values where
the cache holds them, and of these only what the mask of a row allows. Grouped heads are not repeated. Where a runtime gives the
same memory for the cache before and after the step, nothing but the new tokens is written (``cache_lengths``).

Attention stays as it is if its keys are not those of a cache of its own (latent attention computes them from the cache), or if
its mask is not made of booleans that all heads share.

Requires: nothing. Ensures: attention over a cache that no other node reads is one op.
"""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.match import Pattern, concatenated, match, numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import Match, NearMatch, PassReport
from rq_compile.rewrite.rotary_embeddings import HEADS, SWAP_HEADS, merged_heads

NAME = "attention"
OP = "CacheAttention"
TRANSPOSED = ("Reshape", ("Transpose", {"perm": [0, 2, 1]}, ("Reshape", "keys", "matrices")), "transposed")
# Of scaled_dot_product_attention, and of transformers' own attention.
SCORES: tuple[Pattern, ...] = (
    ("Add", ("MatMul", ("Mul", "query", "query_scale"), ("Mul", TRANSPOSED, "key_scale")), "mask"),
    ("Add", ("Mul", ("MatMul", "query", ("Transpose", {"perm": [0, 1, 3, 2]}, "keys")), "query_scale"), "mask"),
)
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
REPEATED = ("Reshape", ("Expand", ("Unsqueeze", "held", "axis"), "repeats"), "shape")


def attention(graph: gs.Graph) -> PassReport:
    """Rewrite every attention of ``graph`` in place."""
    op, report = Ops(graph, NAME), PassReport("attentions")
    for node in [node for node in graph.nodes if node.op == "MatMul"]:
        if found := report.matched(_attention(node, graph)):
            _fuse(op, found)
    graph.cleanup().toposort()
    left = [node for node in graph.nodes if node.op == "MatMul" and isinstance(_attention(node, graph), dict)]
    ensures(NAME, not left, "that no attention over a cache is left in parts")
    return report


def _attention(node: gs.Node, graph: gs.Graph) -> Match | NearMatch | None:
    """The tensors of an attention whose last product is ``node``: query, past and new keys and values, and so on."""
    weights, values = node.inputs
    found = _scores(weights)
    if found is None:
        return None
    if others := {node.op for node in found["scores"].outputs} - OF_A_SOFTMAX:
        return NearMatch(f"its scores are read by {', '.join(sorted(others))}")
    allowed = _allowed(found["mask"])
    if allowed is None:
        return NearMatch("its mask is not made of booleans")
    if allowed.shape[1] != 1:
        return NearMatch("each head has its own mask")
    held = {name: _held(tensor) for name, tensor in (("keys", found["keys"]), ("values", values))}
    for name, cache in held.items():
        appended = _appended(cache, graph)
        if appended is None:
            return NearMatch("its keys are not those of a cache of its own")
        found |= {name: cache, f"past_{name}": appended["past"], f"new_{name}": appended["new"]}
    if len(numbers(found["query_scale"])) != 1 or len(numbers(found.get("key_scale", found["query_scale"]))) != 1:
        return NearMatch("its scale is not known")
    if len(found["query"].shape or []) != 4 or not isinstance(found["query"].shape[1], int):
        return NearMatch(f"its query has the shape {found['query'].shape}")
    return {**found, "allowed": allowed, "result": _guarded(node.outputs[0])}


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


def _allowed(mask: gs.Tensor) -> gs.Tensor | None:
    """bool ``[batch, heads, sequence, tokens]``: the columns that ``mask`` leaves as they are; it excludes all others."""
    found = next((found for pattern in MASKS if (found := match(mask, pattern))), None)
    if found is None or len(found["allowed"].shape or []) != 4:
        return None
    lowest, zero = numbers(found["lowest"]), numbers(found["zero"]) if "zero" in found else [0]
    return found["allowed"] if zero == [0] and len(lowest) == 1 and lowest[0] <= EXCLUDES else None


def _guarded(product: gs.Tensor) -> gs.Tensor:
    """``product``, or what replaces its rows that read nothing."""
    for guard in product.outputs:
        for reshape in guard.outputs[0].outputs if guard.op == "Where" else ():
            found = match(reshape.outputs[0], GUARDED) if reshape.op == "Reshape" else None
            if found and found["product"] is product:
                result: gs.Tensor = reshape.outputs[0]
                return result
    return product


def _held(keys: gs.Tensor) -> gs.Tensor:
    """``[batch, key heads, tokens, dimension]``: keys or values before they are repeated for groups of query heads."""
    repeated = match(keys, REPEATED)
    if repeated and numbers(repeated["axis"]) == [2]:
        shape = concatenated(repeated["repeats"])
        if len(shape) == 5 and shape[1] and shape[2]:
            return repeated["held"]
    return match(keys, "held")["held"]  # type: ignore[index]


def _appended(cache: gs.Tensor, graph: gs.Graph) -> Match | None:
    """``past`` and ``new`` if ``cache`` is an input of the graph with the new tokens, and an output that is read once, apart from
    its shape."""
    found = match(cache, APPENDED)
    of_graph = found is not None and any(found["past"] is tensor for tensor in graph.inputs)
    appends = of_graph and cache.inputs[0].attrs["axis"] in (2, -2) and any(cache is tensor for tensor in graph.outputs)
    alone = sum(node.op != "Shape" for node in cache.outputs) == 1
    return found if appends and alone and len(found["past"].shape) == 4 else None  # type: ignore[index]


def _fuse(op: Ops, found: Match) -> None:
    heads, dimension = found["query"].shape[1], found["past_values"].shape[3]
    scale = float(np.prod([numbers(found[name])[0] for name in ("query_scale", "key_scale") if name in found]))
    operands = [merged_heads(op, _by_token(op, found[name])) for name in ("query", "new_keys", "new_values")]
    operands += [found["past_keys"], found["past_values"], found["allowed"]]
    if "sinks" in found:
        operands.append(op("Reshape", found["sinks"], [-1]))
    for cache in (found["keys"], found["values"]):
        cache.inputs.clear()
    sizes = {"num_heads": heads, "kv_num_heads": found["past_keys"].shape[1], "scale": scale}
    y = op(OP, *operands, **sizes, domain=DOMAIN)
    y.inputs[0].outputs += [found["keys"], found["values"]]
    found["result"].inputs.clear()
    _read_by_token(op, found["result"], y, heads, dimension)


def _by_token(op: Ops, by_head: gs.Tensor) -> gs.Tensor:
    """``[batch, sequence, heads, dimension]``, from ``[batch, heads, sequence, dimension]``."""
    found = match(by_head, HEADS)
    return found["by_token"] if found else op("Transpose", by_head, perm=SWAP_HEADS)


def _read_by_token(op: Ops, by_head: gs.Tensor, y: gs.Tensor, heads: int, dimension: int) -> None:
    """Let every reader of ``by_head [batch, heads, sequence, dimension]`` read ``y [batch, sequence, heads * dimension]``."""
    split = [0, 0, heads, dimension]
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
