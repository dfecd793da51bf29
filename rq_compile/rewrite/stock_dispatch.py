"""Pass: Dispatch in standard ops.

Requires: Dispatch nodes whose replica table is a constant.
Ensures: no Dispatch is left; ``rows`` (here int64, the index type of standard ops) and ``offsets`` hold the same numbers.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures, requires
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport

NAME = "stock_dispatch"


def stock_dispatch(graph: gs.Graph) -> PassReport:
    """Rewrite every Dispatch of ``graph`` in place."""
    report = PassReport("Dispatch nodes", "in standard ops")
    for node in [node for node in graph.nodes if node.op == "Dispatch" and node.domain == DOMAIN]:
        ids, replicas = node.inputs
        rows, offsets = node.outputs
        requires(NAME, isinstance(replicas, gs.Constant), f"a constant replica table at {node.name}")
        node.outputs.clear()
        graph.nodes.remove(node)
        rows.dtype = np.dtype(np.int64)
        _expand(Ops(graph, node.name), ids, replicas.values.astype(np.int64), rows, offsets)
        report.changed += 1
    ensures(NAME, not any(node.op == "Dispatch" for node in graph.nodes), "that no Dispatch node is left")
    return report


def _expand(op: Ops, ids: gs.Tensor, table: np.ndarray, rows: gs.Tensor, offsets: gs.Tensor) -> None:
    """A counting sort, since TensorRT's TopK is limited to 3840 elements and ONNX has no other sort."""
    experts, width = table.shape
    expert = op("Reshape", ids, [-1])
    column = op("Unsqueeze", expert, [1])
    chosen = op("Cast", op("Equal", column, np.arange(experts)[None]), to=onnx.TensorProto.INT32)
    count = op("CumSum", chosen, 0)
    own = op("Squeeze", op("GatherElements", count, column, axis=1), [1])
    earlier = op("Sub", op("Cast", own, to=onnx.TensorProto.INT64), 1)
    bounds = op("Concat", [0], op("CumSum", _rows_of_each_slot(op, count, table), 0), axis=0)
    op("Cast", bounds, to=onnx.TensorProto.INT32, out=offsets)
    if width == 1:
        slot, place = op("Gather", table[:, 0], expert), earlier
    else:
        # The j-th pair of an expert with c slots goes to the expert's slot j mod c, and becomes row j div c of that slot.
        copies = op("Gather", (table >= 0).sum(1), expert)
        slot = op("Gather", table.reshape(-1), op("Add", op("Mul", expert, width), op("Mod", earlier, copies)))
        place = op("Div", earlier, copies)
    pair = op("Range", 0, op("Squeeze", op("Shape", expert)), 1)
    op("ScatterElements", pair, op("Add", op("Gather", bounds, slot), place), pair, axis=0, out=rows)


def _rows_of_each_slot(op: Ops, count: gs.Tensor, table: np.ndarray) -> gs.Tensor:
    """int64 ``[S]`` from the running count of each expert's pairs, int32 ``[P, E]``, which has no last row if there are no
    pairs."""
    load = op("ReduceSum", op("Slice", count, [-1], [np.iinfo(np.int64).max], [0]), [0], keepdims=0)
    expert, number = np.nonzero(table >= 0)
    by_slot = np.argsort(table[expert, number])
    expert, number = expert[by_slot], number[by_slot]
    copies = (table >= 0).sum(1)[expert]
    mine = op("Gather", op("Cast", load, to=onnx.TensorProto.INT64), expert)
    return op("Div", op("Add", mine, copies - 1 - number), copies)
