"""Pass: the two ExpertGemm of a layer become one ``If`` per slot around stock matrix products, and a Concat.

Requires: ``slot_offsets`` and ``rows`` (int64) of each layer, and its two ExpertGemm named ``{layer}.up`` and ``{layer}.down``.
Ensures: no ExpertGemm is left; nothing is run and no weights are read for an empty slot.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.planning.schema import LayerPlan
from rq_compile.quantization.formats import SLOT_FORMATS, Format, block_size
from rq_compile.rewrite.activations import activated
from rq_compile.rewrite.contract import ensures, requires
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.slot_weights import group_of, operands_of
from rq_compile.rewrite.weights import slice_of

NAME = "stock_experts"


def stock_experts(graph: gs.Graph, plans: Sequence[LayerPlan], accuracy_level: int = 0) -> PassReport:
    """Rewrite in place. ``accuracy_level`` goes to MatMulNBits: 0 keeps fp32 activations, 4 quantizes them to int8."""
    report = PassReport("slots", "in branches")
    nodes = {node.name: node for node in graph.nodes if node.op == "ExpertGemm"}
    for plan in (plan.without_constants for plan in plans):
        if not plan.slots:
            continue
        up, down = nodes.get(f"{plan.name}.up"), nodes.get(f"{plan.name}.down")
        requires(NAME, up is not None and down is not None, f"both projections of {plan.name}")
        _expand(graph, plan, up, down, accuracy_level)
        report.changed += len(plan.slots)
    graph.cleanup().toposort()
    ensures(NAME, not any(node.op == "ExpertGemm" for node in graph.nodes), "that no ExpertGemm node is left")
    return report


def _expand(graph: gs.Graph, plan: LayerPlan, up: gs.Node, down: gs.Node, accuracy_level: int) -> None:
    x, rows, offsets = up.inputs[:3]
    (out,) = down.outputs
    down.outputs.clear()
    parameters = [(list(node.inputs[3:]), node.attrs) for node in (up, down)]
    for node in (up, down):
        graph.nodes.remove(node)
        node.inputs.clear()
    op = Ops(graph, f"{plan.name}.slots")
    bounds = op("Cast", offsets, to=onnx.TensorProto.INT64)
    results = []
    for slot, placed in enumerate(plan.slots):
        start, end = op("Gather", bounds, [slot], axis=0), op("Gather", bounds, [slot + 1], axis=0)
        used = op("Squeeze", op("Less", start, end))
        operands = [_Operands(inputs, attrs, slot, placed.format) for inputs, attrs in parameters]
        busy = _busy(plan, slot, x, rows, start, end, operands, accuracy_level)
        results.append(op("If", used, then_branch=busy, else_branch=_idle(plan, slot)))
    op("Concat", *results, axis=0, out=out)


class _Operands:
    """The weights of one slot and projection: slices of the layer's weights and bias."""

    def __init__(self, inputs: list[gs.Tensor], attrs: dict, slot: int, format: Format) -> None:
        group, formats = group_of(format), attrs["formats"]
        index = attrs["weights"][slot] if "weights" in attrs else list(formats[:slot]).count(group)
        self.format = SLOT_FORMATS[format]
        held = dict(zip(operands_of(formats), inputs, strict=False))  # the bias may be left out
        self.bias = slice_of(held["bias"], slot) if "bias" in held else None
        weight, *scales = (held[name] for name in self.format.tensors)
        self.weight, self.index = weight, index
        self.scales = slice_of(scales[0], index) if scales else None


def _busy(
    plan: LayerPlan,
    slot: int,
    x: gs.Tensor,
    rows: gs.Tensor,
    start: gs.Tensor,
    end: gs.Tensor,
    operands: list[_Operands],
    accuracy_level: int,
) -> gs.Graph:
    geometry = plan.geometry
    graph = gs.Graph(name=f"{plan.name}.slot_{slot}", opset=1)
    op = Ops(graph, graph.name)
    token = op("Div", op("Slice", rows, start, end, [0]), geometry.top_k)
    blocks = [block_size(columns, geometry.block) for columns in (geometry.hidden, geometry.intermediate)]
    middle = _product(op, op("Gather", x, token), operands[0], geometry.up_rows, geometry.hidden, blocks[0], accuracy_level)
    activity = activated(op, middle, geometry)
    result = _product(op, activity, operands[1], geometry.hidden, geometry.intermediate, blocks[1], accuracy_level)
    graph.outputs = [result]
    return graph


def _product(op: Ops, x: gs.Tensor, operands: _Operands, rows: int, columns: int, block: int, accuracy_level: int) -> gs.Tensor:
    if not operands.format.quantized:
        weight = slice_of(operands.weight, operands.index)
        if operands.format.name != "fp32":
            weight = op("Cast", weight, to=onnx.TensorProto.FLOAT)
        return op("Gemm", x, weight, *([operands.bias] if operands.bias else []), transB=1)
    bits = operands.format.bits
    packed = slice_of(operands.weight, operands.index, (rows, -(-columns // block), block * bits // 8))
    attributes = {"N": rows, "K": columns, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    y = op("MatMulNBits", x, packed, operands.scales, domain="com.microsoft", **attributes)
    return op("Add", y, operands.bias) if operands.bias else y


def _idle(plan: LayerPlan, slot: int) -> gs.Graph:
    graph = gs.Graph(name=f"{plan.name}.slot_{slot}_idle")
    op = Ops(graph, graph.name)
    graph.outputs = [op("Identity", np.zeros((0, plan.geometry.hidden), np.float32))]
    return graph
