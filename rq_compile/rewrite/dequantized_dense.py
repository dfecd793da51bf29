"""Pass: products by non-expert matrices that the plan rounds multiply by the result of DequantizeLinear, in standard ONNX.

Runtimes fuse both into a product that reads the rounded matrix where they have one, as ONNX Runtime does on GPUs.

Requires: the Experts nodes, by which routers are known. Ensures: every other product by a matrix with a planned format reads
whole numbers and scales; all other products are left as they are.
"""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.quantization.formats import SLOT_FORMATS, Format, block_size
from rq_compile.quantization.packing import whole_numbers
from rq_compile.rewrite.dense_gemms import DenseWeights, Matrix, products
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section, constant


def dequantized_dense(graph: gs.Graph, dense: DenseWeights) -> tuple[list[Section], PassReport]:
    """Rewrite ``graph`` in place and return the matrices, unread."""
    report = PassReport("dense products", "dequantized")
    sections = []
    for matrix in products(graph, report):
        format = dense.rounded(matrix.name)
        if format is not None:
            sections.append(_replace(graph, matrix, format, dense))
            report.changed += 1
    graph.cleanup().toposort()
    return sections, report


def _replace(graph: gs.Graph, matrix: Matrix, format: Format, dense: DenseWeights) -> Section:
    node, section = matrix.node, _section(matrix, format, dense)
    numbers, scales = (constant(weight) for weight in section.weights)
    x, (out,) = node.inputs[0], node.outputs
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    node.inputs.clear()
    node.outputs.clear()
    op = Ops(graph, f"{node.name}.rounded")
    weights = op("DequantizeLinear", numbers, scales, axis=0, block_size=block_size(matrix.columns))
    product = op("MatMul", x, weights, out=None if bias is not None else out)
    if bias is not None:
        op("Add", product, bias, out=out)
    return section


def _section(matrix: Matrix, format: Format, dense: DenseWeights) -> Section:
    """Whole numbers ``[columns, rows]`` and scales ``[blocks, rows]``, fp32."""
    blocks = -(-matrix.columns // block_size(matrix.columns))
    weights = (
        ExternalWeight(f"{matrix.name}.numbers", SLOT_FORMATS[format].dtype, (matrix.columns, matrix.rows)),
        ExternalWeight(f"{matrix.name}.scales", np.dtype(np.float32), (blocks, matrix.rows)),
    )

    def values() -> tuple[np.ndarray, ...]:
        parts = dense.quantized(matrix, format)
        numbers = np.concatenate([whole_numbers(part, format)[:, : matrix.columns] for part in parts])
        return np.ascontiguousarray(numbers.T), np.ascontiguousarray(np.concatenate([part.scales for part in parts]).T)

    read = matrix.rows * matrix.columns * dense.dtype_of(matrix.name).itemsize
    memory = read + 3 * sum(weight.bytes for weight in weights)
    return Section(matrix.name, weights, (Piece(weights, values, memory),))
