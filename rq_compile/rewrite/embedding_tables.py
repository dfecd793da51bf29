"""Pass: an embedding table stays in the 16 bits of the checkpoint, and its rows are widened after they are gathered.

Requires: nothing. Ensures: a 16-bit table that nothing but Gather reads is held as it is stored; no number changes.
"""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.rewrite.halves import HALVES
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.weights import ExternalWeight, constant, external_proto

NAME = "embedding_tables"


def embedding_tables(
    graph: gs.Graph, dtype_of: Callable[[str], np.dtype], rounded: Callable[[str], bool] = lambda name: False
) -> PassReport:
    """Rewrite every Gather from a weight in place. ``dtype_of``: the dtype that the checkpoint stores an initializer in. Tables
    that are to be ``rounded`` are left."""
    report = PassReport("embedding tables", "kept in 16 bit")
    narrow: dict[str, gs.Constant] = {}
    for node in [node for node in graph.nodes if node.op == "Gather"]:
        table = node.inputs[0]
        if (proto := external_proto(table)) is None or rounded(table.name) or dtype_of(table.name) not in HALVES.values():
            continue
        if others := sorted({user.op for user in table.outputs} - {"Gather"}):
            report.leave(f"read by {', '.join(others)}, too")
            continue
        if table.name not in narrow:
            narrow[table.name] = constant(ExternalWeight(table.name, dtype_of(table.name), tuple(proto.dims)))
            report.changed += 1
        _widen_rows(graph, node, narrow[table.name])
    return report


def _widen_rows(graph: gs.Graph, node: gs.Node, table: gs.Constant) -> None:
    (widened,) = node.outputs
    rows = gs.Variable(f"{widened.name}.stored", table.dtype, widened.shape)
    node.inputs[0], node.outputs = table, [rows]
    graph.nodes.append(gs.Node("Cast", f"{node.name}.widened", {"to": onnx.TensorProto.FLOAT}, [rows], [widened]))
