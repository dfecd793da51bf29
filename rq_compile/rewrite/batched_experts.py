"""Pass: the two ExpertGemm of a layer become batched matrix products whose lanes are slots, in standard ONNX ops only.

Slots of one format and capacity class share a product (``planning.capacity.lane_groups``): rows are gathered into
``[slots, capacity, hidden]``, multiplied in a batched MatMul by weights from a block-wise DequantizeLinear, passed through the
activation, and gathered back. Places in a lane without a row compute a copy of another row, which is dropped.

1. Capacity of the batch: a product is as wide as the number of rows of its busiest slot. It is inside of an ``If``: without rows
   nothing is run, and the dequantized weights exist only during the branch. (Outside of an ``If``, ONNX Runtime dequantizes the
   weights of all layers first and keeps them.)
2. Expected capacity, for targets that must know shapes before values: it is computed from the number of rows and the calibrated
   loads. The first pass is in the main graph, where TensorRT keeps quantized weights packed; a ``Loop`` over the same weights
   runs the further passes that a busier slot needs (usually none), so no row is lost.

Requires: opset 21; ``slot_offsets`` and ``rows`` (int64) of each layer, and its ExpertGemm ``{layer}.up`` and ``{layer}.down``.
With expected capacity, also at least one row, since a lane cannot be filled without one.
Ensures: no ExpertGemm is left. If all copies of an expert have the same format, no bit of a row depends on the other rows. This
was measured with ONNX Runtime 1.32 on the CPU, whose MatMul sums every row in the same way unless there is only one row.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.planning.capacity import expected_loads, lane_groups
from rq_compile.planning.schema import LayerPlan
from rq_compile.rewrite.activations import activated
from rq_compile.rewrite.contract import ensures, requires
from rq_compile.rewrite.lane_weights import LaneWeights, lane_weights
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.slot_weights import Source
from rq_compile.rewrite.weights import Section, constant

NAME = "batched_experts"
OPSET = 21  # the first with block-wise DequantizeLinear
SHARES = 1 << 16  # expected shares are integer multiples of its inverse


@dataclass(frozen=True)
class ExpectedCapacity:
    """Lanes with ``headroom`` times the expected rows of their busiest slot; at least ``least``, but no more than it can receive.

    So a step of up to ``least`` tokens, such as decoding, needs one pass, whichever experts its tokens choose; tensor cores
    process 16 rows at a time anyway. A graph that never gets more than ``least`` tokens, according to ``most``, has no loop for
    further passes.
    """

    headroom: float = 1.25
    least: int = 16
    most: int | None = None


@dataclass(frozen=True)
class _Product:
    """A product: the slots that are its lanes, int64 ``[n]``, and their weights."""

    slots: np.ndarray
    up: LaneWeights
    down: LaneWeights


@dataclass(frozen=True)
class _Rows:
    """The P rows, ordered by slot, that the lanes are filled from.

    ``token`` int64 ``[P + 1]``: the row of ``x`` that each row comes from, and one more entry for places without a row, whose
    number P is ``none`` int64 ``[1]``. Slot s has the rows from ``first[s]`` up to but not including ``last[s]``, int64 ``[S]``;
    rows of constant experts come after those of all slots.
    """

    x: gs.Tensor
    token: gs.Tensor
    none: gs.Tensor
    first: gs.Tensor
    last: gs.Tensor


# What ``up`` and ``down`` of a product are multiplied with.
_Matrices = tuple[gs.Tensor, gs.Tensor]


def batched_experts(
    graph: gs.Graph,
    plans: Sequence[LayerPlan],
    source: Source,
    expected: ExpectedCapacity | None = None,
    *,
    whole_columns: bool = False,
) -> tuple[list[Section], PassReport]:
    """Rewrite in place and return the weights the graph now refers to, a section for each layer: each slot has its own.

    ``expected``: case 2 above; None: case 1. ``whole_columns``: see ``lane_weights``.
    """
    requires(NAME, graph.opset >= OPSET, f"opset {OPSET} or later")
    nodes = {node.name: node for node in graph.nodes if node.op == "ExpertGemm"}
    sections, report = [], PassReport("slots", "in lanes")
    for plan in plans:
        if not plan.without_constants.slots:
            continue
        up, down = nodes.get(f"{plan.name}.up"), nodes.get(f"{plan.name}.down")
        requires(NAME, up is not None and down is not None, f"both projections of {plan.name}")
        products = _products(plan, source, whole_columns)
        _expand(graph, plan, up, down, products, expected)
        sections.append(_section(plan, products))
        report.changed += len(plan.without_constants.slots)
    graph.cleanup().toposort()
    ensures(NAME, not any(node.op == "ExpertGemm" for node in graph.nodes), "that no ExpertGemm node is left")
    return sections, report


def lanes_section(plan: LayerPlan, source: Source, *, whole_columns: bool = False) -> Section:
    """The weights that ``batched_experts`` gives a layer whose slots all compute."""
    return _section(plan, _products(plan, source, whole_columns))


def _section(plan: LayerPlan, products: list[_Product]) -> Section:
    lanes = [lane for product in products for lane in (product.up, product.down)]
    weights, pieces = ([held for lane in lanes for held in getattr(lane, what)] for what in ("all", "pieces"))
    return Section(plan.name, tuple(weights), tuple(pieces))


def _products(plan: LayerPlan, source: Source, whole_columns: bool) -> list[_Product]:
    groups = lane_groups(plan.without_constants.slots)
    found = []
    for number in range(groups.max() + 1):
        slots = np.flatnonzero(groups == number)
        held, name = [plan.slots[slot] for slot in slots], f"{plan.name}.lanes_{number}"
        weights = (lane_weights(plan, held, name, p, source, whole_columns=whole_columns) for p in ("up", "down"))
        found.append(_Product(slots, *weights))
    return found


def _expand(
    graph: gs.Graph, plan: LayerPlan, up: gs.Node, down: gs.Node, products: list[_Product], expected: ExpectedCapacity | None
) -> None:
    x, rows, offsets = up.inputs[:3]
    (out,) = down.outputs
    down.outputs.clear()
    for node in (up, down):
        graph.nodes.remove(node)
        node.inputs.clear()
    op = Ops(graph, f"{plan.name}.lanes")
    bounds = op("Cast", offsets, to=onnx.TensorProto.INT64)
    if plan.constant_experts:  # whose rows come last and are in no lane
        bounds = op("Slice", bounds, [0], [len(plan.without_constants.slots) + 1], [0])
    token = op("Div", op("Concat", rows, [0], axis=0), plan.geometry.top_k)
    first, last = op("Slice", bounds, [0], [-1], [0]), op("Slice", bounds, [1], [np.iinfo(np.int64).max], [0])
    batch = _Rows(x, token, op("Shape", rows), first, last)
    if expected is None:
        _with_capacity_of_the_batch(op, plan, products, batch, out)
    else:
        _with_expected_capacity(op, plan, products, batch, expected, out)


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
        inside = Ops(busy, busy.name)
        busy.outputs = [_experts(inside, plan, product, _matrices(inside, product), row, batch)]
        idle.outputs = [Ops(idle, idle.name)("ConstantOfShape", [0, plan.geometry.hidden])]
        outputs.append(op("If", op("Greater", busiest, 0), then_branch=busy, else_branch=idle))
    row_of_lane = op("Concat", *rows_of_lanes, axis=0)
    lane = op("Range", 0, op("Squeeze", op("Shape", row_of_lane)), 1)
    nowhere = op("Expand", 0, op("Add", batch.none, 1))
    held = op("Slice", batch.last, [-1], [np.iinfo(np.int64).max], [0]) if plan.constant_experts else batch.none
    lane_of_row = op("Slice", op("ScatterElements", nowhere, row_of_lane, lane, axis=0), [0], held, [0])
    op("Gather", op("Concat", *outputs, axis=0), lane_of_row, out=out)


def _with_expected_capacity(
    op: Ops, plan: LayerPlan, products: list[_Product], batch: _Rows, expected: ExpectedCapacity, out: gs.Tensor
) -> None:
    capacities = [_capacity(op, plan, product, batch, expected) for product in products]
    places = [op("Range", 0, op("Squeeze", capacity), 1) for capacity in capacities]
    start = op("Expand", np.float32(0), op("Concat", op("Add", batch.none, 1), [plan.geometry.hidden], axis=0))
    matrices = [_matrices(op, product) for product in products]
    first_pass = _one_pass(op, plan, products, matrices, places, batch, start)
    if expected.most is not None and expected.most <= expected.least:
        op("Slice", first_pass, [0], batch.none, [0], out=out)
        return

    order = np.concatenate([product.slots for product in products])
    of_slots = [op("Expand", capacity, [len(product.slots)]) for capacity, product in zip(capacities, products, strict=True)]
    capacity = op("Gather", op("Concat", *of_slots, axis=0), np.argsort(order))
    passes = op("Div", op("Sub", op("Add", op("Sub", batch.last, batch.first), capacity), 1), capacity)
    further = op("Sub", op("Max", op("ReduceMax", passes, [0], keepdims=0), 1), 1)

    body = gs.Graph(name=f"{plan.name}.pass")
    into = Ops(body, body.name)
    number, more = gs.Variable(f"{body.name}.number", np.int64, []), gs.Variable(f"{body.name}.more", np.bool_, [])
    before = gs.Variable(f"{body.name}.before", np.float32, [None, plan.geometry.hidden])
    done = into("Add", number, 1)
    later = [into("Add", into("Mul", done, rows), place) for rows, place in zip(capacities, places, strict=True)]
    after = _one_pass(into, plan, products, matrices, later, batch, before)
    body.inputs, body.outputs = [number, more, before], [into("Identity", more), after]
    op("Slice", op("Loop", further, True, first_pass, body=body), [0], batch.none, [0], out=out)


def _capacity(op: Ops, plan: LayerPlan, product: _Product, batch: _Rows, expected: ExpectedCapacity) -> gs.Tensor:
    """int64 ``[1]``: rows of each lane of ``product``, computed in integers, as shapes are."""
    copies = Counter(slot.expert for slot in plan.slots)
    fewest = min(copies[plan.slots[slot].expert] for slot in product.slots)
    share = min(1.0, float(expected_loads(plan.slots)[product.slots].max()) * expected.headroom)
    wanted = op("Div", op("Add", op("Mul", batch.none, math.ceil(share * SHARES)), SHARES - 1), SHARES)
    # No token chooses an expert twice, and an expert's copies take turns.
    turns = plan.geometry.top_k * fewest
    possible = op("Div", op("Add", batch.none, turns - 1), turns)
    # One row alone takes another kernel in ONNX Runtime, and its last bits would depend on who else is in the batch.
    return op("Max", op("Min", op("Max", wanted, expected.least), possible), 2)


def _one_pass(
    op: Ops,
    plan: LayerPlan,
    products: list[_Product],
    matrices: list[_Matrices],
    places: list[gs.Tensor],
    batch: _Rows,
    before: gs.Tensor,
) -> gs.Tensor:
    """fp32 ``[P + 1, hidden]``: ``before`` with the rows at ``places``, int64 ``[capacity]`` of each product, filled in."""
    rows_of_lanes, outputs = [], []
    for product, held, place in zip(products, matrices, places, strict=True):
        first, last = op("Gather", batch.first, product.slots), op("Gather", batch.last, product.slots)
        row = _rows_of_lanes(op, first, last, place, batch)
        rows_of_lanes.append(op("Reshape", row, [-1, 1]))
        outputs.append(_experts(op, plan, product, held, row, batch))
    return op("ScatterND", before, op("Concat", *rows_of_lanes, axis=0), op("Concat", *outputs, axis=0))


def _rows_of_lanes(op: Ops, first: gs.Tensor, last: gs.Tensor, place: gs.Tensor, batch: _Rows) -> gs.Tensor:
    """int64 ``[n, capacity]``: the number of the row at each place of each lane; P if the slot has no more rows."""
    row = op("Add", op("Unsqueeze", first, [1]), op("Unsqueeze", place, [0]))
    return op("Where", op("Less", row, op("Unsqueeze", last, [1])), row, batch.none)


def _matrices(op: Ops, product: _Product) -> _Matrices:
    return _matrix(op, product.up), _matrix(op, product.down)


def _matrix(op: Ops, weights: LaneWeights) -> gs.Tensor:
    """fp32 ``[n, padded columns, rows]``."""
    matrix = constant(weights.values)
    if weights.scales:
        return op("DequantizeLinear", matrix, constant(weights.scales), axis=1, block_size=weights.block)
    return matrix if weights.values.dtype == np.float32 else op("Cast", matrix, to=onnx.TensorProto.FLOAT)


def _experts(op: Ops, plan: LayerPlan, product: _Product, matrices: _Matrices, row: gs.Tensor, batch: _Rows) -> gs.Tensor:
    """fp32 ``[n * capacity, hidden]``: the slots' outputs for their rows, lane by lane."""
    geometry, (up, down) = plan.geometry, matrices
    lanes = op("Gather", batch.x, op("Gather", batch.token, row))
    middle = _multiplied(op, lanes, up, product.up, geometry.hidden)
    result = _multiplied(op, activated(op, middle, geometry), down, product.down, geometry.intermediate)
    return op("Reshape", result, [-1, geometry.hidden])


def _multiplied(op: Ops, lanes: gs.Tensor, matrix: gs.Tensor, weights: LaneWeights, columns: int) -> gs.Tensor:
    """fp32 ``[n, capacity, rows]``: the product of ``lanes [n, capacity, columns]`` with ``matrix``."""
    padded = weights.values.shape[1]
    if padded > columns:
        lanes = op("Pad", lanes, [0, 0, 0, 0, 0, padded - columns])
    product = op("MatMul", lanes, matrix)
    return op("Add", product, constant(weights.bias)) if weights.bias else product
