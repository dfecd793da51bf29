"""Pass: Dispatch in standard ops.

Requires: Dispatch nodes whose replica table is a constant.
Ensures: none is left; ``rows`` (here int64, as standard ops index) and ``offsets`` hold the same numbers.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures, requires
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.ops import Ops

NAME = "stock_dispatch"


def stock_dispatch(graph: gs.Graph) -> None:
    """Rewrite every Dispatch of ``graph`` in place."""
    for node in [node for node in graph.nodes if node.op == "Dispatch" and node.domain == DOMAIN]:
        ids, replicas = node.inputs
        rows, offsets = node.outputs
        requires(NAME, isinstance(replicas, gs.Constant), f"a constant replica table at {node.name}")
        node.outputs.clear()
        graph.nodes.remove(node)
        rows.dtype = np.dtype(np.int64)
        _expand(Ops(graph, node.name), ids, replicas.values.astype(np.int64), int(node.attrs["slots"]), rows, offsets)
    ensures(NAME, not any(node.op == "Dispatch" for node in graph.nodes), "that no Dispatch node is left")


def _expand(op: Ops, ids: gs.Tensor, table: np.ndarray, slots: int, rows: gs.Tensor, offsets: gs.Tensor) -> None:
    expert = op("Reshape", ids, [-1])
    slot = _slot_of_each(op, expert, table)
    pairs = op("Shape", expert)
    # The keys are all different, so their order is that of a stable sort by slot, whatever TopK does with ties.
    position = op("Range", 0, op("Squeeze", pairs), 1)
    key = op("Add", op("Mul", slot, pairs), position)
    _, order = op("TopK", key, pairs, axis=0, largest=0, sorted=1, outputs=2)
    op("Identity", order, out=rows)
    held = op("Equal", op("Unsqueeze", slot, [1]), op("Unsqueeze", np.arange(slots), [0]))
    counts = op("ReduceSum", op("Cast", held, to=onnx.TensorProto.INT64), [0], keepdims=0)
    total = op("CumSum", counts, 0)
    op("Cast", op("Concat", [0], total, axis=0), to=onnx.TensorProto.INT32, out=offsets)


def _slot_of_each(op: Ops, expert: gs.Tensor, table: np.ndarray) -> gs.Tensor:
    """int64 ``[P]``: the j-th pair of an expert, in order, goes to the expert's slot j modulo its number of slots."""
    experts, width = table.shape
    if width == 1:
        return op("Gather", table[:, 0], expert)
    column = op("Unsqueeze", expert, [1])
    mine = op("Cast", op("Equal", column, np.arange(experts)[None]), to=onnx.TensorProto.INT64)
    seen = op("Squeeze", op("GatherElements", op("CumSum", mine, 0), column, axis=1), [1])
    copy = op("Mod", op("Sub", seen, 1), op("Gather", (table >= 0).sum(1), expert))
    return op("Gather", table.reshape(-1), op("Add", op("Mul", expert, width), copy))
