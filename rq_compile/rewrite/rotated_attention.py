"""Pass: CacheAttention rotates its queries and keys itself, where both come from RotaryEmbedding nodes with the same angles.

This saves two nodes for each attention, and those that number the tokens for RotaryEmbedding.

Requires: rotations and attentions as ``rotary_embeddings`` and ``attention`` write them. Ensures: no CacheAttention reads queries
and keys that such nodes rotate for it alone.
"""

import onnx_graphsurgeon as gs

from rq_compile.rewrite import attention
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.report import PassReport

NAME = "rotated_attention"
ROTATION = "RotaryEmbedding"
SINKS = 6  # the optional input before the angles


def rotated_attention(graph: gs.Graph) -> PassReport:
    """Rewrite every such attention of ``graph`` in place."""
    report = PassReport("rotated attentions")
    for node in [node for node in graph.nodes if node.op == attention.OP]:
        if (rotations := _rotations(node, graph)) is None:
            continue
        of_query, of_key = rotations
        sinks = node.inputs[SINKS:] or [gs.Variable.empty()]
        node.inputs = [of_query.inputs[0], of_key.inputs[0], *node.inputs[2:SINKS], *sinks, *of_query.inputs[2:]]
        report.changed += 1
    graph.cleanup().toposort()
    left = [node for node in graph.nodes if node.op == attention.OP and _rotations(node, graph)]
    ensures(NAME, not left, "that no attention reads queries and keys that are rotated for it alone")
    return report


def _rotations(node: gs.Node, graph: gs.Graph) -> list[gs.Node] | None:
    """The nodes that rotate the query and the key of ``node``, with the same angles and for no other reader."""
    own = [tensor for tensor in node.inputs[:2] if len(tensor.outputs) == 1 and not any(tensor is out for out in graph.outputs)]
    rotations = [producer for tensor in own for producer in tensor.inputs if producer.op == ROTATION]
    if len(rotations) != 2:
        return None
    query, key = ([id(tensor) for tensor in rotation.inputs[1:]] for rotation in rotations)
    return rotations if query == key else None
