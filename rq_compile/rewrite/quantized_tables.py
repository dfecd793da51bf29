"""Pass: an embedding table that the plan rounds is stored in blocks, and its rows are dequantized after they are gathered.

Only standard ops are used, so that every runtime and provider can run it: the rows of a batch are few.

Requires: nothing. Ensures: a table with a planned format that only Gather reads has packed numbers and scales.
"""

from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.quantization.formats import BLOCK_FORMATS, block_size
from rq_compile.quantization.quantizer import quantize
from rq_compile.rewrite.dense_gemms import DenseWeights
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section, constant, external_proto

# Rows of a table that are rounded at a time.
ROWS_AT_ONCE = 1 << 14


def quantized_tables(graph: gs.Graph, dense: DenseWeights) -> tuple[list[Section], PassReport]:
    """Rewrite ``graph`` in place and return the tables, unread."""
    report = PassReport("embedding tables", "rounded")
    sections: dict[str, Section] = {}
    for node in [node for node in graph.nodes if node.op == "Gather"]:
        table = node.inputs[0]
        if (proto := external_proto(table)) is None or (format := dense.rounded(table.name, table=True)) is None:
            continue
        if others := sorted({user.op for user in table.outputs} - {"Gather"}):
            report.leave(f"read by {', '.join(others)}, too")
            continue
        rows, columns = proto.dims
        if table.name not in sections:
            sections[table.name] = _section(table.name, rows, columns, format, dense)
            report.changed += 1
        _dequantize_rows(graph, node, sections[table.name], columns, format)
    graph.cleanup().toposort()
    return list(sections.values()), report


def _section(name: str, rows: int, columns: int, format: Literal["int8", "int4"], dense: DenseWeights) -> Section:
    kept, block = BLOCK_FORMATS[format], block_size(columns)
    blocks = -(-columns // block)
    weights = (
        ExternalWeight(f"{name}.rows", np.dtype(np.uint8), (rows, blocks * block * kept.bits // 8)),
        ExternalWeight(f"{name}.row_scales", np.dtype(np.float32), (rows, blocks)),
    )

    def values() -> tuple[np.ndarray, ...]:
        table = dense.read(name)
        parts = [quantize(table[start : start + ROWS_AT_ONCE], format) for start in range(0, rows, ROWS_AT_ONCE)]
        packed = np.concatenate([part.packed for part in parts])
        return packed.reshape(rows, -1), np.concatenate([part.scales for part in parts])

    memory = rows * columns * dense.dtype_of(name).itemsize + 2 * sum(weight.bytes for weight in weights)
    return Section(name, weights, (Piece(weights, values, memory),))


def _dequantize_rows(graph: gs.Graph, node: gs.Node, section: Section, columns: int, format: Literal["int8", "int4"]) -> None:
    packed, scales = (constant(weight) for weight in section.weights)
    ids, (out,) = node.inputs[1], node.outputs
    node.inputs.clear()
    node.outputs.clear()
    op = Ops(graph, f"{node.name}.rounded")
    kept, block = BLOCK_FORMATS[format], block_size(columns)
    numbers = op("Cast", op("Gather", packed, ids, axis=0), to=onnx.TensorProto.FLOAT)
    if kept.bits == 4:
        # The first of two numbers is in the low bits.
        high = op("Floor", op("Mul", numbers, np.float32(1 / 16)))
        low = op("Sub", numbers, op("Mul", high, np.float32(16)))
        numbers = op("Concat", op("Unsqueeze", low, [-1]), op("Unsqueeze", high, [-1]), axis=-1)
    lead = op("Shape", ids)
    by_block = op("Reshape", numbers, op("Concat", lead, [-1, block], axis=0))
    centered = op("Sub", by_block, np.float32(kept.zero_point))
    values = op("Mul", centered, op("Unsqueeze", op("Gather", scales, ids, axis=0), [-1]))
    flat = op("Reshape", values, op("Concat", lead, [-1], axis=0))
    op("Slice", flat, [0], [columns], [-1], out=out)
