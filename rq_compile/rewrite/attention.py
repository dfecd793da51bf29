"""Pass: attention in separate ops becomes ONNX Runtime's MultiHeadAttention, on keys and values as the cache holds them.

torch's ``scaled_dot_product_attention`` is exported as about twenty ops, which copy and transpose the keys of all previous tokens
for each new token. The fused op reads keys and values from the output of the cache's Concat, as [batch, heads, tokens,
dimension].

1. Equal numbers of key heads and query heads: the op is used directly.
2. g query heads for each key head (grouped-query attention): the exporter repeats keys and values g times, and the op does not
   support groups. Here the g queries of a head are placed one after the other, as if the sequence were g times as long, and the
   mask is repeated (a small tensor, the same for every layer); keys and values are not copied.
3. Where the op alone reads the new cache, it also appends the new keys and values to it. Each head is then copied by the thread
   that reads it next, while it is in that processor's cache; a Concat would pass over the whole memory once more.

Latent attention, whose values are narrower than its keys, stays as it is: the op has one width for both. So does attention with a
bias for each head. A query that may attend to nothing (a padding token) gets 0, as in torch. A graph with the op needs ONNX
Runtime 1.23, and says so.

Requires: nothing. Ensures: ``scaled_dot_product_attention`` with a mask is one op, except for latent attention.
"""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.match import concatenated, match, numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import Match, NearMatch, PassReport
from rq_compile.rewrite.rotary_embeddings import HEADS, SWAP_HEADS, merged_heads

NAME = "attention"
# With several sequences, ONNX Runtime 1.20 reads a mask that all heads share incorrectly, without an error. This is the first
# version of the file format that 1.20, 1.21 and 1.22 reject; 1.23 is the first release that accepts it.
FILE_FORMAT = 11
KEYS = ("Reshape", ("Transpose", {"perm": [0, 2, 1]}, ("Reshape", "keys", "matrices")), "transposed")
SCORES = ("Add", ("MatMul", ("Mul", "query", "query_scale"), ("Mul", KEYS, "key_scale")), "mask")
WEIGHTED = ("Where", "nothing", "zeros", ("MatMul", ("Softmax", {"axis": -1}, SCORES), "values"))
ATTENTION = ("Transpose", {"perm": SWAP_HEADS}, ("Reshape", WEIGHTED, "shape"))
# The cache with the new tokens, as the exporter writes it; the axis is 2 or -2.
APPENDED = ("Concat", "past", ("Transpose", {"perm": SWAP_HEADS}, "by_token"))
REPEATED = ("Reshape", ("Expand", ("Unsqueeze", "held", "axis"), "repeats"), "shape")


def attention(graph: gs.Graph) -> PassReport:
    """Rewrite every attention of ``graph`` in place."""
    op, report = Ops(graph, NAME), PassReport("attentions")
    masks: dict[tuple[int, int], gs.Tensor] = {}
    for node in [node for node in graph.nodes if node.op == "Transpose"]:
        (result,) = node.outputs
        if found := report.matched(_attention(result)):
            node.outputs.clear()
            graph.ir_version = max(graph.ir_version, FILE_FORMAT)
            y = _fused(op, result.shape[2], found, masks)
            for merge in list(result.outputs):
                merge.inputs[0] = y
    graph.cleanup()
    for node in [node for node in graph.nodes if node.op == "MultiHeadAttention"]:
        _append_to_cache(op, node)
    graph.cleanup().toposort()
    left = [node for node in graph.nodes if node.op == "Transpose" and isinstance(_attention(node.outputs[0]), dict)]
    ensures(NAME, not left, "that no attention is left in parts")
    return report


def _attention(result: gs.Tensor) -> Match | NearMatch | None:
    found = match(result, ATTENTION)
    if found is None:
        return None
    if others := sorted({node.op for node in result.outputs} - {"Reshape"}):
        return NearMatch(f"its heads are read by {', '.join(others)}")
    query, by_token = found["query"].shape or [], result.shape or []
    known = len(query) == len(by_token) == 4 and all(isinstance(size, int) for size in by_token[2:])
    scales = len(numbers(found["query_scale"])) == len(numbers(found["key_scale"])) == 1
    if not known or not scales:
        return NearMatch(f"the query {query} or a scale is not known")
    masks = [tensor.shape for tensor in (found["mask"], found["nothing"]) if len(tensor.shape or []) == 4]
    if any(isinstance(shape[1], int) and shape[1] != 1 for shape in masks):
        return NearMatch("each head has its own mask")
    return found if query[3] == by_token[3] else NearMatch(f"heads of {query[3]} have values of {by_token[3]}")


def _fused(op: Ops, heads: int, found: dict[str, gs.Tensor], masks: dict[tuple[int, int], gs.Tensor]) -> gs.Tensor:
    """``[batch, sequence, heads * dimension]``. ``masks``: the masks repeated so far, by mask and number of repeats."""
    keys, values, groups = _held(found)
    key_heads, dimension = heads // groups, found["query"].shape[3]
    by_head, mask = match(found["query"], HEADS), found["mask"]
    query = merged_heads(op, by_head["by_token"] if by_head else op("Transpose", found["query"], perm=SWAP_HEADS))
    # Not as the op's scale: ONNX Runtime has a fast product of one row with the keys, but only without a scale.
    query = op("Mul", query, np.float32(numbers(found["query_scale"])[0] * numbers(found["key_scale"])[0]))
    if groups > 1:
        if (id(mask), groups) not in masks:
            masks[id(mask), groups] = op("Concat", *[mask] * groups, axis=2)
        mask = masks[id(mask), groups]
        by_group = op("Transpose", op("Reshape", query, [0, 0, key_heads, groups, dimension]), perm=[0, 3, 1, 2, 4])
        query = op("Reshape", by_group, [0, -1, key_heads * dimension])
    operands = [query, keys, values, gs.Variable.empty(), gs.Variable.empty(), mask]
    y = op("MultiHeadAttention", *operands, num_heads=key_heads, scale=1.0, domain="com.microsoft")
    if groups > 1:
        by_token = op("Transpose", op("Reshape", y, [0, groups, -1, key_heads, dimension]), perm=[0, 2, 3, 1, 4])
        y = op("Reshape", by_token, [0, 0, heads * dimension])
    return op("Where", op("Squeeze", found["nothing"], [1]), np.float32(0), y)


def _held(found: dict[str, gs.Tensor]) -> tuple[gs.Tensor, gs.Tensor, int]:
    """Keys and values ``[batch, key heads, tokens, dimension]``, and the number of query heads per key head."""
    keys, values = match(found["keys"], REPEATED), match(found["values"], REPEATED)
    if keys and values and numbers(keys["axis"]) == numbers(values["axis"]) == [2]:
        shapes = [concatenated(repeated["repeats"])[1:3] for repeated in (keys, values)]
        groups = shapes[0][1] if shapes[0] else None
        if groups and shapes[0][0] and shapes[0] == shapes[1]:
            return keys["held"], values["held"], groups
    return found["keys"], found["values"], 1


def _append_to_cache(op: Ops, node: gs.Node) -> None:
    """Give ``node`` the cache before the step and the new keys and values in place of the cache after the step, if it alone reads
    that."""
    after = node.inputs[1:3]
    found = [appended for cache in after if (appended := _appended(cache, op.graph)) is not None]
    if len(found) < len(after) or any(list(cache.outputs) != [node] for cache in after):
        return
    for cache in after:
        cache.inputs.clear()
    new = [merged_heads(op, cache["by_token"]) for cache in found]
    node.inputs = [node.inputs[0], *new, *node.inputs[3:], *(cache["past"] for cache in found)]
    node.outputs = [*node.outputs, *after]


def _appended(cache: gs.Tensor, graph: gs.Graph) -> Match | None:
    """``past`` and ``by_token`` if ``cache`` is an output of the graph: an input of it with the new tokens."""
    found = match(cache, APPENDED)
    of_graph = found is not None and any(found["past"] is tensor for tensor in graph.inputs)
    appends = of_graph and cache.inputs[0].attrs["axis"] in (2, -2) and any(cache is tensor for tensor in graph.outputs)
    return found if appends else None
