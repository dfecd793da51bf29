"""Pass: products with the dense weights become DenseGemm, which reads a matrix in 16 bits as stored, or in int8 or int4.

Most of the weights that one token reads are not experts but attention, shared experts and the head. On the CPU, ONNX Runtime
multiplies only in fp32, so that a bf16 matrix would take twice its bytes; DenseGemm widens 16-bit weights in registers without
loss, and reads int8 and int4 in panels as ExpertGemm does.

Products of one tensor by matrices of one format, such as those for queries, keys and values, are one node with several outputs:
a node costs about two microseconds, and each would round the tensor again.

Requires: the Experts nodes, by which routers are known: their matrices stay as they are, since rounding them changes routing.
Ensures: every other product by a weight matrix of 16 rows or more is one of a DenseGemm, unless the matrix is stored in fp32; no
two of these nodes multiply the same tensor by matrices of one format.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.quantization.formats import QUANTIZED_FORMATS, SLOT_FORMATS, DenseFormat, Format, PlannedDense, block_size
from rq_compile.quantization.packing import Quantized
from rq_compile.quantization.quantizer import quantize
from rq_compile.quantization.second_moment import SecondMoment
from rq_compile.rewrite.contract import ensures, requires
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.panels import ROWS, float_panels, packed_panels, panel_count, scale_panels
from rq_compile.rewrite.report import NearMatch, PassReport
from rq_compile.rewrite.slot_weights import group_of
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section, constant, external_proto

NAME = "dense_gemms"
OP = "DenseGemm"
# Rows of a matrix that are quantized and packed at a time; a head has more than 100 000.
ROWS_AT_ONCE = 64 * ROWS


class Matrix:
    """A weight matrix ``[rows, columns]``, with a row for each output, that ``node`` multiplies by."""

    def __init__(self, node: gs.Node, weight: gs.Constant, shape: tuple[int, int], by_row: bool) -> None:
        self.node = node
        self.name = weight.name
        self.by_row = by_row
        self.rows, self.columns = shape if by_row else shape[::-1]


@dataclass(frozen=True)
class DenseWeights:
    """The model's initializers by name: the dtype that they are stored in, and their values in it, oriented as in the graph.

    ``planned(name, table)``: the format that the plan gives a matrix, or an embedding table; None if it gives none. ``moment``:
    that of the inputs of such a matrix.
    """

    dtype_of: Callable[[str], np.dtype]
    read: Callable[[str], np.ndarray]
    planned: Callable[[str, bool], PlannedDense | None] = lambda name, table: None
    moment: Callable[[str], SecondMoment | None] = lambda name: None
    by_plan: bool = False  # whether the plan has any such formats

    def rounded(self, name: str, *, table: bool = False) -> Literal["int8", "int4"] | None:
        """The format that the plan rounds a matrix or an embedding table to."""
        format = self.planned(name, table)
        return None if format == "stored" else format

    def format_of(self, matrix: Matrix, otherwise: DenseFormat) -> Format | None:
        """The format of ``matrix`` in the engine; None if there is none for its dtype. ``otherwise``: see ``dense_gemms``."""
        if otherwise in QUANTIZED_FORMATS and not self.by_plan:
            return otherwise
        return self.rounded(matrix.name) or _float_format(self.dtype_of(matrix.name))

    def rows(self, matrix: Matrix) -> Iterator[np.ndarray]:
        """The values of ``matrix``, ``[ROWS_AT_ONCE, columns]`` at a time; the last part may have fewer rows."""
        values = self.read(matrix.name)
        values = values if matrix.by_row else values.T
        return (values[first : first + ROWS_AT_ONCE] for first in range(0, matrix.rows, ROWS_AT_ONCE))

    def quantized(self, matrix: Matrix, format: Format) -> list[Quantized]:
        """The parts of ``rows``, rounded with the moment of the matrix if there is one."""
        moment = self.moment(matrix.name)
        return [quantize(rows, format, moment) for rows in self.rows(matrix)]


def dense_gemms(
    graph: gs.Graph, format: DenseFormat, dense: DenseWeights, activation_bits: int = 32
) -> tuple[list[Section], PassReport]:
    """Rewrite ``graph`` in place and return the weights that its DenseGemm nodes refer to, unread.

    Matrices get the format of the plan. For those that it does not mention, "stored" keeps 16 bit as they are, and "int8" and
    "int4" round each block of a row to the nearest. With "int4", the head is int8, because its rounding error reaches the logits
    directly. ``activation_bits`` is DenseGemm's, see ``experts_to_slots``.
    """
    head = _head(graph)
    how = "as planned" if dense.by_plan else f"in {format}" if format in QUANTIZED_FORMATS else "as stored"
    report = PassReport("dense products", f"read {how}")
    together: dict[tuple[int, Format], list[Matrix]] = {}
    for matrix in products(graph, report):
        kept = dense.format_of(matrix, "int8" if matrix.node is head and format in QUANTIZED_FORMATS else format)
        if kept is None or kept == "fp32":
            report.leave(f"stored in {dense.dtype_of(matrix.name)}")
        else:
            together.setdefault((id(matrix.node.inputs[0]), kept), []).append(matrix)
            report.changed += 1
    sections = [_replace(graph, matrices, kept, dense, activation_bits) for (_, kept), matrices in together.items()]
    graph.cleanup().toposort()
    read = [(id(node.inputs[0]), *node.attrs["formats"]) for node in graph.nodes if node.op == OP]
    ensures(NAME, len(read) == len(set(read)), "one product of a tensor for each format")
    return sections, report


def products(graph: gs.Graph, report: PassReport) -> list[Matrix]:
    """The products by non-expert matrices that may be stored in another way; ``report`` gets the others. Requires the Experts
    nodes."""
    experts = [node for node in graph.nodes if node.op == "Experts" and node.domain == DOMAIN]
    requires(NAME, bool(experts), "the Experts nodes")
    routers = {id(router) for node in experts for router in _routers(node)}
    found = []
    for matrix in [matrix for node in graph.nodes if (matrix := matrix_of(node))]:
        if isinstance(matrix, NearMatch):
            report.leave(matrix.why)
        elif id(matrix.node) in routers:
            report.leave("they choose experts")
        elif matrix.rows < ROWS:
            # The gate of a shared expert takes no time, and ONNX Runtime multiplies fp32 as fast.
            report.leave(f"{matrix.rows} rows")
        else:
            found.append(matrix)
    return found


def _routers(experts: gs.Node) -> Iterator[gs.Node]:
    """The products from which the choice of experts and the gates are computed."""
    _, ids, gates = experts.inputs
    pending, seen = [ids, gates], set()
    while pending:
        tensor = pending.pop()
        for node in tensor.inputs:
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(matrix_of(node), Matrix):
                yield node
            else:
                pending += node.inputs


def _head(graph: gs.Graph) -> gs.Node | None:
    """The product that the logits are computed from, if there is one."""
    tensor = next((output for output in graph.outputs if output.name == "logits"), None)
    while tensor is not None and tensor.inputs:
        (node,) = tensor.inputs
        if isinstance(matrix_of(node), Matrix):
            return node
        tensor = next((given for given in node.inputs if given.inputs), None)
    return None


def matrix_of(node: gs.Node) -> Matrix | NearMatch | None:
    """The weight matrix that ``node`` multiplies by, if it does."""
    if node.op not in ("MatMul", "Gemm") or len(node.inputs) < 2 or (proto := external_proto(node.inputs[1])) is None:
        return None
    for name, plain in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        if (given := node.attrs.get(name, plain)) != plain:
            return NearMatch(f"{name} {given}")
    if len(proto.dims) != 2 or external_proto(node.inputs[0]) is not None:
        return NearMatch(f"weights of shape {list(proto.dims)}")
    return Matrix(node, node.inputs[1], tuple(proto.dims), bool(node.attrs.get("transB", 0)))


def _float_format(dtype: np.dtype) -> Format | None:
    return next((name for name, format in SLOT_FORMATS.items() if not format.quantized and format.dtype == dtype), None)


def _replace(graph: gs.Graph, matrices: Sequence[Matrix], format: Format, dense: DenseWeights, activation_bits: int) -> Section:
    """Multiply by ``matrices``, which have one input and one format, in one node."""
    section = joined_section([matrix_section(matrix, format, dense) for matrix in matrices])
    x, operands = matrices[0].node.inputs[0], [constant(weight) for weight in section.weights]
    outputs = [matrix.rows for matrix in matrices]
    attributes = {"formats": [group_of(format)], "outputs": outputs, "activation_bits": activation_bits}
    results = [_unbiased(graph, matrix.node) for matrix in matrices]
    graph.nodes.append(gs.Node(OP, matrices[0].node.name, attributes, [x, *operands], results, domain=DOMAIN))
    for matrix in matrices:
        matrix.node.inputs.clear()
    return section


def _unbiased(graph: gs.Graph, node: gs.Node) -> gs.Tensor:
    """The result of ``node``, which becomes that of another node, or what its bias is added to."""
    (result,) = node.outputs
    node.outputs.clear()
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return result
    product = gs.Variable(f"{result.name}.product", result.dtype, result.shape)
    graph.nodes.append(gs.Node("Add", f"{node.name}.bias", {}, [product, node.inputs[2]], [result]))
    return product


def joined_section(sections: Sequence[Section]) -> Section:
    """The matrices of ``sections``, which have as many columns and one format, in one, panels after panels."""
    if len(sections) == 1:
        return sections[0]
    name = "+".join(section.name for section in sections)
    weights = []
    for parts in zip(*(section.weights for section in sections), strict=True):
        (slots, _, *of_panel), panels = parts[0].shape, sum(part.shape[1] for part in parts)
        of_parts = parts[0].name.removeprefix(sections[0].name)
        weights.append(ExternalWeight(name + of_parts, parts[0].dtype, (slots, panels, *of_panel)))
    pieces = [replace(piece, weights=tuple(weights)) for section in sections for piece in section.pieces]
    return Section(name, tuple(weights), tuple(pieces))


def matrix_section(matrix: Matrix, format: Format, dense: DenseWeights) -> Section:
    """The one matrix of DenseGemm's format group, laid out as ``panels`` draws it."""
    panels, block = panel_count(matrix.rows, 1), block_size(matrix.columns)
    blocks = -(-matrix.columns // block)

    def floats() -> tuple[np.ndarray, ...]:
        return (np.concatenate([float_panels(rows, 1) for rows in dense.rows(matrix)]),)

    def quantized() -> tuple[np.ndarray, ...]:
        parts = dense.quantized(matrix, format)
        packed = np.concatenate([packed_panels(part, format, 1) for part in parts])
        return packed, np.concatenate([scale_panels(part, 1) for part in parts])

    weights: tuple[ExternalWeight, ...]
    kept = SLOT_FORMATS[format]
    if kept.quantized:
        of_packed, of_scales = (f"{matrix.name}.{name}" for name in kept.tensors)
        groups = blocks * block * kept.bits // 32
        weights = (
            ExternalWeight(of_packed, np.dtype(np.uint8), (1, panels, groups, 4 * ROWS)),
            ExternalWeight(of_scales, np.dtype(np.float32), (1, panels, blocks, ROWS)),
        )
    else:
        weights = (ExternalWeight(f"{matrix.name}.panels", kept.dtype, (1, panels, matrix.columns, ROWS)),)
    read = matrix.rows * matrix.columns * dense.dtype_of(matrix.name).itemsize
    memory = read + 2 * sum(weight.bytes for weight in weights)
    return Section(matrix.name, weights, (Piece(weights, quantized if kept.quantized else floats, memory),))
