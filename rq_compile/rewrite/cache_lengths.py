"""Pass: the number of cached tokens comes from the attention mask, where the shape of the cache would say it.

CacheAttention also takes a cache with room for further tokens, so that a runtime can keep it in one place and the op writes only
what is new. The shape of such a cache is not its number of tokens.

Requires: nothing. Ensures: no Shape reads the cache of a CacheAttention, unless other nodes read that cache, too.
"""

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs

from rq_compile.rewrite.attention import OP
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport

NAME = "cache_lengths"
TOKENS_AXIS = 2
PAST, PRESENT = slice(3, 5), slice(1, 3)  # inputs and outputs of the op


def cache_lengths(graph: gs.Graph) -> PassReport:
    """Rewrite every such Shape of ``graph`` in place."""
    op, report = Ops(graph, NAME), PassReport("lengths of caches", "read off the mask")
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    for past, present in _caches(graph):
        others = [node for node in (*past.outputs, *present.outputs) if node.op != OP and not _is_length(node)]
        if others:
            report.leave(f"{past.name} is read by {', '.join(sorted({node.op for node in others}))}")
            continue
        for node in [node for node in (*past.outputs, *present.outputs) if _is_length(node)]:
            (length,) = node.outputs
            node.outputs.clear()
            columns = op("Shape", inputs["attention_mask"], start=1, end=2)
            new = op("Shape", inputs["input_ids"], start=1, end=2) if node.inputs[0] is past else [0]
            op("Sub", columns, new, out=length)
            report.changed += 1
    graph.cleanup().toposort()
    for cache in _caches(graph):
        readers = [node.op for tensor in cache for node in tensor.outputs]
        ensures(NAME, set(readers) - {OP} != {"Shape"}, "that no length is read off a cache")
    return report


def caches_in_place(model: onnx.ModelProto) -> set[str]:
    """The inputs of the graph that are caches which may have room for further tokens: only a CacheAttention reads them, and
    nothing reads what it returns."""
    nodes = [node for node in model.graph.node if node.op_type == OP]
    caches = {past: present for node in nodes for past, present in zip(node.input[PAST], node.output[PRESENT], strict=True)}
    others = {name for node in model.graph.node if node.op_type != OP for name in node.input}
    return {past for past, present in caches.items() if not {past, present} & others}


def _caches(graph: gs.Graph) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    for node in graph.nodes:
        if node.op == OP:
            yield from zip(node.inputs[PAST], node.outputs[PRESENT], strict=True)


def _is_length(node: gs.Node) -> bool:
    return node.op == "Shape" and (node.attrs.get("start", 0), node.attrs.get("end")) == (TOKENS_AXIS, TOKENS_AXIS + 1)
