"""Pass: the two ExpertGemm of a layer become batched matrix products whose lanes are slots, in standard ONNX ops only.

Slots of one format and capacity class share a product (``planning.capacity.lane_groups``): rows are gathered into
``[slots, capacity, hidden]``, a batched MatMul takes them through block-wise DequantizeLinear weights and the activation, and
they are gathered back. Lanes that have no row compute a copy of another and are dropped.

1. Capacity of the batch: a product is as wide as its busiest slot has rows. It stands in an ``If``: without rows it runs nothing,
   and its dequantized weights live no longer than the branch. (Outside one, ONNX Runtime dequantizes the weights of every layer
   first and keeps them all.)
2. Fixed capacity, for targets that need static shapes: a ``Loop`` of as many passes as the busiest slot needs, so no row is lost.

Requires: opset 21; ``slot_offsets`` and ``rows`` (int64) of each layer, and its ExpertGemm ``{layer}.up`` and ``{layer}.down``.
Ensures: no ExpertGemm is left. While all copies of an expert have one format, no bit of a row depends on the other rows: so it
was found with ONNX Runtime 1.32 on the CPU, whose MatMul adds up every row alike unless it has one row only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.planning.capacity import expected_loads, fixed_capacity, lane_groups
from rq_compile.planning.schema import LayerPlan
from rq_compile.rewrite.activations import activated
from rq_compile.rewrite.contract import ensures, requires
from rq_compile.rewrite.lane_weights import LaneWeights, lane_weights
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.slot_weights import Source
from rq_compile.rewrite.weights import Section, constant

NAME = "batched_experts"
OPSET = 21  # the first with block-wise DequantizeLinear


@dataclass(frozen=True)
class FixedCapacity:
    """Lanes for a step of ``tokens`` tokens, with ``headroom`` times the rows that the busiest slot expects."""

    tokens: int
    headroom: float = 1.25


@dataclass(frozen=True)
class _Product:
    """The slots that are its lanes, int64 ``[n]``, and their weights."""

    slots: np.ndarray
    up: LaneWeights
    down: LaneWeights


@dataclass(frozen=True)
class _Rows:
    """What the lanes are filled from, P rows by slot.

    ``token`` int64 ``[P + 1]``: the row of ``x`` that each comes from, and one more for lanes that have none, whose number P is
    ``none`` int64 ``[1]``. Slot s has the rows from ``first[s]`` to before ``last[s]``, int64 ``[S]``.
    """

    x: gs.Tensor
    token: gs.Tensor
    none: gs.Tensor
    first: gs.Tensor
    last: gs.Tensor


def batched_experts(
    graph: gs.Graph, plans: Sequence[LayerPlan], source: Source, fixed: FixedCapacity | None = None
) -> list[Section]:
    """Rewrite in place and return the weights the graph now refers to, a section for each layer: each slot has its own."""
    requires(NAME, graph.opset >= OPSET, f"opset {OPSET} or later")
    nodes = {node.name: node for node in graph.nodes if node.op == "ExpertGemm"}
    sections = []
    for plan in plans:
        up, down = nodes.get(f"{plan.name}.up"), nodes.get(f"{plan.name}.down")
        requires(NAME, up is not None and down is not None, f"both projections of {plan.name}")
        products = _products(plan, source)
        _expand(graph, plan, up, down, products, fixed)
        lanes = [lane for product in products for lane in (product.up, product.down)]
        weights, pieces = ([held for lane in lanes for held in getattr(lane, what)] for what in ("all", "pieces"))
        sections.append(Section(plan.name, tuple(weights), tuple(pieces)))
    graph.cleanup().toposort()
    ensures(NAME, not any(node.op == "ExpertGemm" for node in graph.nodes), "that no ExpertGemm node is left")
    return sections


def _products(plan: LayerPlan, source: Source) -> list[_Product]:
    groups = lane_groups(plan.slots)
    found = []
    for number in range(groups.max() + 1):
        slots = np.flatnonzero(groups == number)
        held, name = [plan.slots[slot] for slot in slots], f"{plan.name}.lanes_{number}"
        found.append(_Product(slots, *(lane_weights(plan, held, name, projection, source) for projection in ("up", "down"))))
    return found


def _expand(
    graph: gs.Graph, plan: LayerPlan, up: gs.Node, down: gs.Node, products: list[_Product], fixed: FixedCapacity | None
) -> None:
    x, rows, offsets = up.inputs[:3]
    (out,) = down.outputs
    down.outputs.clear()
    for node in (up, down):
        graph.nodes.remove(node)
        node.inputs.clear()
    op = Ops(graph, f"{plan.name}.lanes")
    bounds = op("Cast", offsets, to=onnx.TensorProto.INT64)
    token = op("Div", op("Concat", rows, [0], axis=0), plan.geometry.top_k)
    first, last = op("Slice", bounds, [0], [-1]), op("Slice", bounds, [1], [np.iinfo(np.int64).max])
    batch = _Rows(x, token, op("Shape", rows), first, last)
    if fixed is None:
        _with_capacity_of_the_batch(op, plan, products, batch, out)
    else:
        _with_fixed_capacity(op, plan, products, batch, fixed, out)


def _with_capacity_of_the_batch(op: Ops, plan: LayerPlan, products: list[_Product], batch: _Rows, out: gs.Tensor) -> None:
    rows_of_lanes, outputs = [], []
    for number, product in enumerate(products):
        first, last = op("Gather", batch.first, product.slots), op("Gather", batch.last, product.slots)
        busiest = op("ReduceMax", op("Sub", last, first), [0], keepdims=0)
        # One row alone takes another kernel in ONNX Runtime, and its last bits would depend on who else is in the batch.
        capacity = op("Mul", op("Max", busiest, 2), op("Min", busiest, 1))
        row = _rows_of_lanes(op, first, last, op("Range", 0, capacity, 1), batch)
        rows_of_lanes.append(op("Reshape", row, [-1]))
        busy, idle = (gs.Graph(name=f"{plan.name}.lanes_{number}{state}") for state in ("", "_idle"))
        busy.outputs = [_experts(Ops(busy, busy.name), plan, product, row, batch)]
        idle.outputs = [Ops(idle, idle.name)("ConstantOfShape", [0, plan.geometry.hidden])]
        outputs.append(op("If", op("Greater", busiest, 0), then_branch=busy, else_branch=idle))
    row_of_lane = op("Concat", *rows_of_lanes, axis=0)
    lane = op("Range", 0, op("Squeeze", op("Shape", row_of_lane)), 1)
    nowhere = op("Expand", 0, op("Add", batch.none, 1))
    lane_of_row = op("Slice", op("ScatterElements", nowhere, row_of_lane, lane, axis=0), [0], batch.none)
    op("Gather", op("Concat", *outputs, axis=0), lane_of_row, out=out)


def _with_fixed_capacity(
    op: Ops, plan: LayerPlan, products: list[_Product], batch: _Rows, fixed: FixedCapacity, out: gs.Tensor
) -> None:
    loads, pairs = expected_loads(plan.slots), fixed.tokens * plan.geometry.top_k
    capacities = [fixed_capacity(loads[product.slots], pairs, fixed.headroom) for product in products]
    capacity = np.zeros(len(plan.slots), np.int64)
    for product, rows in zip(products, capacities, strict=True):
        capacity[product.slots] = rows
    needed = op("Div", op("Add", op("Sub", batch.last, batch.first), capacity - 1), capacity)
    passes = op("ReduceMax", needed, [0], keepdims=0)

    body = gs.Graph(name=f"{plan.name}.pass")
    into = Ops(body, body.name)
    number, more = gs.Variable(f"{body.name}.number", np.int64, []), gs.Variable(f"{body.name}.more", np.bool_, [])
    before = gs.Variable(f"{body.name}.before", np.float32, [None, plan.geometry.hidden])
    rows_of_lanes, outputs = [], []
    for product, rows in zip(products, capacities, strict=True):
        first, last = into("Gather", batch.first, product.slots), into("Gather", batch.last, product.slots)
        place = into("Add", into("Mul", number, rows), np.arange(rows))
        row = _rows_of_lanes(into, first, last, place, batch)
        rows_of_lanes.append(into("Reshape", row, [-1, 1]))
        outputs.append(_experts(into, plan, product, row, batch))
    after = into("ScatterND", before, into("Concat", *rows_of_lanes, axis=0), into("Concat", *outputs, axis=0))
    body.inputs, body.outputs = [number, more, before], [into("Identity", more), after]

    start = op("Expand", np.float32(0), op("Concat", op("Add", batch.none, 1), [plan.geometry.hidden], axis=0))
    filled = op("Loop", passes, True, start, body=body)
    op("Slice", filled, [0], batch.none, [0], out=out)


def _rows_of_lanes(op: Ops, first: gs.Tensor, last: gs.Tensor, place: gs.Tensor, batch: _Rows) -> gs.Tensor:
    """int64 ``[n, capacity]``: the row by slot that each place of each lane holds, P where the slot has none left."""
    row = op("Add", op("Unsqueeze", first, [1]), op("Unsqueeze", place, [0]))
    return op("Where", op("Less", row, op("Unsqueeze", last, [1])), row, batch.none)


def _experts(op: Ops, plan: LayerPlan, product: _Product, row: gs.Tensor, batch: _Rows) -> gs.Tensor:
    """fp32 ``[n * capacity, hidden]``: what the slots make of their rows, lane by lane."""
    geometry = plan.geometry
    lanes = op("Gather", batch.x, op("Gather", batch.token, row))
    middle = _multiplied(op, lanes, product.up, geometry.hidden)
    result = _multiplied(op, activated(op, middle, geometry), product.down, geometry.intermediate)
    return op("Reshape", result, [-1, geometry.hidden])


def _multiplied(op: Ops, lanes: gs.Tensor, weights: LaneWeights, columns: int) -> gs.Tensor:
    """fp32 ``[n, capacity, rows]`` of ``lanes [n, capacity, columns]``."""
    matrix, padded = constant(weights.values), weights.values.shape[1]
    if weights.scales:
        matrix = op("DequantizeLinear", matrix, constant(weights.scales), axis=1, block_size=weights.block)
    elif weights.values.dtype != np.float32:
        matrix = op("Cast", matrix, to=onnx.TensorProto.FLOAT)
    if padded > columns:
        lanes = op("Pad", lanes, [0, 0, 0, 0, 0, padded - columns])
    product = op("MatMul", lanes, matrix)
    return op("Add", product, constant(weights.bias)) if weights.bias else product
