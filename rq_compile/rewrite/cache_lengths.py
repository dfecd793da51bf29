"""Pass: the number of cached tokens comes from the attention mask, where the shape of the cache would say it.

CacheAttention and LatentAttention also take a cache with room for further tokens, so that a runtime can keep it in one place and
the op writes only what is new. The shape of such a cache is not its number of tokens.

Requires: nothing. Ensures: no Shape reads the cache of such an op, unless other nodes read that cache, too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from rq_compile.rewrite import attention, latent_attention
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport

NAME = "cache_lengths"
OPS = (attention.OP, latent_attention.OP)
RANK, TOKENS_AXIS = 4, 2  # of keys and values
PAST, PRESENT = slice(3, 5), slice(1, 3)  # inputs and outputs of the ops


def cache_lengths(graph: gs.Graph) -> PassReport:
    """Rewrite every such Shape of ``graph`` in place."""
    op, report = Ops(graph, NAME), PassReport("lengths of caches", "read off the mask")
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    for past, present in _caches(graph):
        readers = [node for tensor in (*past, *present) for node in tensor.outputs if _reads_tokens(node.op, node.attrs)]
        if others := sorted({node.op for node in readers if not _is_length(node)}):
            report.leave(f"{past[0].name} or its values are read by {', '.join(others)}")
            continue
        for node in readers:
            (length,) = node.outputs
            node.outputs.clear()
            columns = op("Shape", inputs["attention_mask"], start=1, end=2)
            new = op("Shape", inputs["input_ids"], start=1, end=2) if any(node.inputs[0] is held for held in past) else [0]
            op("Sub", columns, new, out=length)
            report.changed += 1
    graph.cleanup().toposort()
    for past, present in _caches(graph):
        left = [node for tensor in (*past, *present) for node in tensor.outputs if _reads_tokens(node.op, node.attrs)]
        ensures(NAME, not left or not all(map(_is_length, left)), "that no length is read off a cache")
    return report


def caches_in_place(model: onnx.ModelProto) -> set[str]:
    """The inputs of the graph that are caches which may have room for further tokens: those that only one of the ops reads, and
    nothing after it."""
    others = {
        name
        for node in model.graph.node
        if _reads_tokens(node.op_type, {entry.name: entry.i for entry in node.attribute})
        for name in node.input
    }
    held = [node for node in model.graph.node if node.op_type in OPS]
    alone = [node for node in held if not {*node.input[PAST], *node.output[PRESENT]} & others]
    return {name for node in alone for name in node.input[PAST]}


def _caches(graph: gs.Graph) -> Iterator[tuple[list[gs.Tensor], list[gs.Tensor]]]:
    """Keys and values of each attention, before and after the step."""
    for node in graph.nodes:
        if node.op in OPS:
            yield node.inputs[PAST], node.outputs[PRESENT]


def _reads_tokens(op: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a node that reads a cache depends on its number of columns; the ops do not count."""
    start, end = attributes.get("start", 0), attributes.get("end", RANK)
    axes = range(RANK)[start:end]
    return op not in OPS and not (op == "Shape" and TOKENS_AXIS not in axes)


def _is_length(node: gs.Node) -> bool:
    return node.op == "Shape" and (node.attrs.get("start", 0), node.attrs.get("end")) == (TOKENS_AXIS, TOKENS_AXIS + 1)
