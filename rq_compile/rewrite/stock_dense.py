"""Pass: products by non-expert matrices that the plan rounds become MatMulNBits, which any ONNX Runtime has.

Requires: the Experts nodes, by which routers are known. Ensures: every other product by a matrix with a planned format is a
MatMulNBits; all other products are left as they are.
"""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.quantization.formats import BLOCK_FORMATS, Format, block_size
from rq_compile.rewrite.dense_gemms import DenseWeights, Matrix, products
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section, constant


def stock_dense(graph: gs.Graph, dense: DenseWeights, accuracy_level: int = 0) -> tuple[list[Section], PassReport]:
    """Rewrite ``graph`` in place and return the matrices, unread. ``accuracy_level``: see ``stock_experts``."""
    report = PassReport("dense products", "rounded")
    sections = []
    for matrix in products(graph, report):
        format = dense.rounded(matrix.name)
        if format is not None:
            sections.append(_replace(graph, matrix, format, dense, accuracy_level))
            report.changed += 1
    graph.cleanup().toposort()
    return sections, report


def _replace(graph: gs.Graph, matrix: Matrix, format: Format, dense: DenseWeights, accuracy_level: int) -> Section:
    node, section = matrix.node, _section(matrix, format, dense)
    packed, scales = (constant(weight) for weight in section.weights)
    x, (out,) = node.inputs[0], node.outputs
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    node.inputs.clear()
    node.outputs.clear()
    op = Ops(graph, f"{node.name}.rounded")
    attributes = {
        "N": matrix.rows,
        "K": matrix.columns,
        "bits": BLOCK_FORMATS[format].bits,
        "block_size": block_size(matrix.columns),
        "accuracy_level": accuracy_level,
    }
    product = op("MatMulNBits", x, packed, scales, domain="com.microsoft", out=None if bias is not None else out, **attributes)
    if bias is not None:
        op("Add", product, bias, out=out)
    return section


def _section(matrix: Matrix, format: Format, dense: DenseWeights) -> Section:
    bits, block = BLOCK_FORMATS[format].bits, block_size(matrix.columns)
    blocks = -(-matrix.columns // block)
    weights = (
        ExternalWeight(f"{matrix.name}.packed", np.dtype(np.uint8), (matrix.rows, blocks, block * bits // 8)),
        ExternalWeight(f"{matrix.name}.scales", np.dtype(np.float32), (matrix.rows * blocks,)),
    )

    def values() -> tuple[np.ndarray, ...]:
        parts = dense.quantized(matrix, format)
        return np.concatenate([part.packed for part in parts]), np.concatenate([part.scales for part in parts])

    read = matrix.rows * matrix.columns * dense.dtype_of(matrix.name).itemsize
    memory = read + 2 * sum(weight.bytes for weight in weights)
    return Section(matrix.name, weights, (Piece(weights, values, memory),))
