"""Pass: every Experts node becomes Dispatch, ExpertGemm (up), ExpertGemm (down), Combine, with the weights of the plan's slots.

Requires: one ``rq.moe::Experts`` node for each layer of the plan, known by its attribute ``layer``.
Ensures: no Experts node is left, and each layer's tensor ``{layer}.slot_offsets`` exists.
"""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.slot_weights import SlotWeights, Source, group_of, slot_weights
from rq_compile.rewrite.weights import Section, constant

NAME = "experts_to_slots"
PROJECTIONS = ("up", "down")
EXPERTS_NODES = ("experts nodes", "rewritten")
DOMAIN = "rq.moe"


def offsets_name(layer: str) -> str:
    """The tensor with the cumulative rows per slot, int32 ``[S + 1]``, the same in every lowering."""
    return f"{layer}.slot_offsets"


def replica_table(plan: LayerPlan) -> np.ndarray:
    """int32 ``[E, R]``: the slots of each expert in slot order, padded with -1 to the R of the most copied expert."""
    copies: list[list[int]] = [[] for _ in range(plan.geometry.experts)]
    for slot, placed in enumerate(plan.slots):
        copies[placed.expert].append(slot)
    width = max(map(len, copies))
    return np.array([held + [-1] * (width - len(held)) for held in copies], np.int32)


def experts_nodes(graph: gs.Graph, plans: Sequence[LayerPlan]) -> list[tuple[LayerPlan, gs.Node]]:
    """Every Experts node of ``graph`` with its layer's plan.

    Raises:
        UserError: a layer of the model is missing from the plan, or the other way round (the layer is named).
    """
    by_name = {plan.name: plan for plan in plans}
    nodes = {node.attrs["layer"]: node for node in graph.nodes if node.op == "Experts" and node.domain == DOMAIN}
    for name in [*nodes, *by_name]:
        if name not in by_name:
            raise UserError(f"MoE layer {name} of the model is not in the plan; re-run rq-compile plan", 2)
        if name not in nodes:
            raise UserError(f"layer {name} of the plan is not an MoE layer of the model; re-run rq-compile plan", 2)
    return [(by_name[name], node) for name, node in nodes.items()]


def experts_to_slots(
    graph: gs.Graph,
    plans: Sequence[LayerPlan],
    source: Source | None,
    *,
    panels: bool = True,
    activation_bits: int = 32,
) -> tuple[list[Section], PassReport]:
    """Rewrite ``graph`` in place and return the weights it now refers to, a section for each layer, unread.

    Without a ``source``, the products have no weights, for a pass that replaces them. ``panels``: see ``slot_weights``.
    ``activation_bits`` is ExpertGemm's: 8 rounds the values multiplied with quantized weights to int8, 32 keeps them in fp32.

    Raises:
        UserError: a layer of the model is missing from the plan, or the other way round (the layer is named).
    """
    sections, report = [], PassReport(*EXPERTS_NODES)
    for plan, node in experts_nodes(graph, plans):
        projections = [slot_weights(plan, p, source, panels=panels) for p in PROJECTIONS] if source else []
        _replace(graph, node, plan, projections, activation_bits)
        weights, pieces = ([held for p in projections for held in getattr(p, what)] for what in ("inputs", "pieces"))
        sections.append(Section(plan.name, tuple(weights), tuple(pieces)))
        report.changed += 1
    graph.cleanup().toposort()
    ensures(NAME, not any(node.op == "Experts" for node in graph.nodes), "that no Experts node is left")
    ensures(NAME, {offsets_name(plan.name) for plan in plans} <= set(graph.tensors()), "slot_offsets for every layer")
    return sections, report


def _replace(graph: gs.Graph, node: gs.Node, plan: LayerPlan, projections: list[SlotWeights], activation_bits: int) -> None:
    x, ids, gates = node.inputs
    (y,) = node.outputs
    node.outputs.clear()
    layer, geometry, slots = plan.name, plan.geometry, len(plan.slots)
    rows = gs.Variable(f"{layer}.rows", np.dtype(np.int32))
    offsets = gs.Variable(offsets_name(layer), np.dtype(np.int32), [slots + 1])
    middle = gs.Variable(f"{layer}.intermediate", np.dtype(np.float32))
    out = gs.Variable(f"{layer}.slot_outputs", np.dtype(np.float32))
    replicas = gs.Constant(f"{layer}.replicas", replica_table(plan))

    def add(op: str, inputs: list[gs.Tensor], results: list[gs.Tensor], suffix: str, **attributes: object) -> None:
        graph.nodes.append(gs.Node(op, f"{layer}.{suffix}", attributes, inputs, results, domain=DOMAIN))

    def gemm(inputs: list[gs.Tensor], output: gs.Tensor, suffix: str, **attributes: object) -> None:
        if projections:
            weights = projections[PROJECTIONS.index(suffix)]
            inputs = inputs + [constant(weight) for weight in weights.inputs]
            formats = [group_of(slot.format) for slot in plan.slots]
            attributes = {"formats": formats, "weights": list(weights.index), **attributes}
        add("ExpertGemm", inputs, [output], suffix, **attributes)

    numbers = {"alpha": float(geometry.alpha), "limit": float(geometry.limit), "activation_bits": activation_bits}
    add("Dispatch", [ids, replicas], [rows, offsets], "dispatch", slots=slots)
    gemm([x, rows, offsets], middle, "up", activation=geometry.activation, outputs=geometry.intermediate, gather=1, **numbers)
    gemm([middle, rows, offsets], out, "down", activation="none", outputs=geometry.hidden, gather=0, **numbers)
    add("Combine", [out, rows, gates], [y], "combine")
