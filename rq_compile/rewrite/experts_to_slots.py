"""Pass: every Experts node becomes Dispatch, ExpertGemm (up), ExpertGemm (down), Combine, with the weights of the plan's slots.

Requires: one ``rq.moe::Experts`` node for each layer of the plan, known by its attribute ``layer``.
Ensures: no Experts node is left, and each layer's tensor ``{layer}.slot_offsets`` exists.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan
from rq_compile.rewrite.constant_experts import combine_inputs
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.slot_weights import SlotWeights, Source, group_of, section_of, slot_weights
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
    ``activation_bits`` is ExpertGemm's: 8 rounds the values multiplied with quantized weights to int8 and, with ``panels``,
    those multiplied with bf16 weights to bf16; 32 keeps them in fp32.

    Raises:
        UserError: a layer of the model is missing from the plan, or the other way round (the layer is named).
    """
    sections, report = [], PassReport(*EXPERTS_NODES)
    for plan, node in experts_nodes(graph, plans):
        layer = SlotNodes(graph, plan.without_constants, source, panels=panels, activation_bits=activation_bits)
        _replace(layer, node, plan)
        sections.append(layer.section)
        report.changed += 1
    graph.cleanup().toposort()
    ensures(NAME, not any(node.op == "Experts" for node in graph.nodes), "that no Experts node is left")
    ensures(NAME, {offsets_name(plan.name) for plan in plans} <= set(graph.tensors()), "slot_offsets for every layer")
    return sections, report


class SlotNodes:
    """Adds the nodes of one layer to ``graph``. ``plan.slots`` are those that the graph computes. See ``experts_to_slots`` for
    the other arguments."""

    def __init__(
        self, graph: gs.Graph, plan: LayerPlan, source: Source | None, *, panels: bool = True, activation_bits: int = 32
    ) -> None:
        self.graph, self.plan, self.activation_bits = graph, plan, activation_bits
        self._weights: dict[str, SlotWeights] = {}
        if source and plan.slots:
            self._weights = {name: slot_weights(plan, name, source, panels=panels) for name in PROJECTIONS}

    @property
    def section(self) -> Section:
        """The weights that the nodes refer to."""
        return section_of(self.plan.name, self._weights.values())

    def tensor(self, name: str, dtype: type, shape: Sequence[int | str] | None = None) -> gs.Variable:
        return gs.Variable(f"{self.plan.name}.{name}", np.dtype(dtype), shape)

    def add(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        results: Sequence[gs.Tensor],
        name: str,
        domain: str = DOMAIN,
        **attributes: Any,
    ) -> None:
        node = gs.Node(op, f"{self.plan.name}.{name}", attributes, list(inputs), list(results), domain=domain)
        self.graph.nodes.append(node)

    def products(self, x: gs.Tensor, rows: gs.Tensor, offsets: gs.Tensor) -> gs.Tensor:
        """Both ExpertGemms: float ``[rows, hidden]`` in the order of slots, of the rows of ``x`` that ``rows`` names."""
        geometry = self.plan.geometry
        middle, out = self.tensor("intermediate", np.float32), self.tensor("slot_outputs", np.float32)
        self._gemm([x, rows, offsets], middle, "up", activation=geometry.activation, outputs=geometry.intermediate, gather=1)
        self._gemm([middle, rows, offsets], out, "down", activation="none", outputs=geometry.hidden, gather=0)
        return out

    def _gemm(self, inputs: list[gs.Tensor], output: gs.Tensor, projection: str, **attributes: Any) -> None:
        if weights := self._weights.get(projection):
            inputs = inputs + [constant(weight) for weight in weights.inputs]
            formats = [group_of(slot.format) for slot in self.plan.slots]
            attributes = {"formats": formats, "weights": list(weights.index), **attributes}
        geometry = self.plan.geometry
        numbers: dict[str, Any] = {
            "alpha": float(geometry.alpha),
            "limit": float(geometry.limit),
            "activation_bits": self.activation_bits,
        }
        self.add("ExpertGemm", inputs, [output], projection, **attributes, **numbers)


def _replace(layer: SlotNodes, node: gs.Node, plan: LayerPlan) -> None:
    x, ids, gates = node.inputs
    (y,) = node.outputs
    node.outputs.clear()
    slots = len(plan.slots)
    rows, offsets = layer.tensor("rows", np.int32), gs.Variable(offsets_name(plan.name), np.dtype(np.int32), [slots + 1])
    layer.add(
        "Dispatch", [ids, gs.Constant(f"{plan.name}.replicas", replica_table(plan))], [rows, offsets], "dispatch", slots=slots
    )
    outputs = layer.products(x, rows, offsets) if layer.plan.slots else _no_rows(layer, x, offsets)
    layer.add("Combine", [outputs, rows, gates, *combine_inputs(plan, ids)], [y], "combine")


def _no_rows(layer: SlotNodes, x: gs.Tensor, offsets: gs.Tensor) -> gs.Tensor:
    """The first ``offsets[0]`` rows of ``x``, which are none. No pass removes the offsets, because this reads them."""
    op = Ops(layer.graph, f"{layer.plan.name}.no_rows")
    none = np.zeros(1, np.int32)
    return op("Slice", x, none, op("Gather", offsets, none), none)
