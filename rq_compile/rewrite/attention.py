"""Pass: attention in separate ops becomes CacheAttention, which appends the new keys and values to the cache itself.

torch's ``scaled_dot_product_attention`` is exported as about twenty ops, which copy and transpose the keys of all previous tokens
for each new token; transformers' own attention, for models with attention sinks, as about ten. The op reads keys and values where
the cache holds them, and of these only what the mask of a row allows. Grouped heads are not repeated. Where a runtime gives the
same memory for the cache before and after the step, nothing but the new tokens is written (``cache_lengths``).

Attention stays as it is if its keys are not those of a cache of its own, or if its mask is not made of booleans that all heads
share. Keys and values that are computed from the cache are those of ``latent_attention``.

Requires: nothing. Ensures: attention over a cache that no other node reads is one op.
"""

import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.match import concatenated, match, numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import Match, NearMatch, PassReport
from rq_compile.rewrite.rotary_embeddings import merged_heads
from rq_compile.rewrite.softmax_attention import appended, by_token, mask_of, read_by_token, scale_of, softmax_attention, unknown

NAME = "attention"
OP = "CacheAttention"
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
    found = softmax_attention(node)
    if not isinstance(found, dict):
        return found
    held = {name: _held(tensor) for name, tensor in (("keys", found["keys"]), ("values", found["values"]))}
    for name, cache in held.items():
        extended = appended(cache, graph)
        if extended is None:
            return NearMatch("its keys are not those of a cache of its own")
        found |= {name: cache, f"past_{name}": extended["past"], f"new_{name}": extended["new"]}
    return unknown(found) or found


def _held(keys: gs.Tensor) -> gs.Tensor:
    """``[batch, key heads, tokens, dimension]``: keys or values before they are repeated for groups of query heads."""
    repeated = match(keys, REPEATED)
    if repeated and numbers(repeated["axis"]) == [2]:
        shape = concatenated(repeated["repeats"])
        if len(shape) == 5 and shape[1] and shape[2]:
            return repeated["held"]
    return match(keys, "held")["held"]  # type: ignore[index]


def _fuse(op: Ops, found: Match) -> None:
    heads, dimension = found["query"].shape[1], found["past_values"].shape[3]
    operands = [merged_heads(op, by_token(op, found[name])) for name in ("query", "new_keys", "new_values")]
    operands += [found["past_keys"], found["past_values"], mask_of(op, found)]
    if "sinks" in found:
        operands.append(op("Reshape", found["sinks"], [-1]))
    for cache in (found["keys"], found["values"]):
        cache.inputs.clear()
    sizes = {"num_heads": heads, "kv_num_heads": found["past_keys"].shape[1], "scale": scale_of(found)}
    y = op(OP, *operands, **sizes, domain=DOMAIN)
    y.inputs[0].outputs += [found["keys"], found["values"]]
    found["result"].inputs.clear()
    read_by_token(op, found["result"], y, heads, dimension)
