"""Pass: every Experts node becomes one MoeLayer node, the op of the GPU libraries, with the weights of the plan's slots.

The node's inputs, their types and its attributes are listed in plugins/tensorrt/README.md; TensorRT's ONNX parser finds a plugin
by the ``plugin_`` attributes. The node computes in 16 bits, between two casts, whatever type the rest of the graph computes in.
It ignores choices of constant experts, which standard ops add.

Requires: one ``rq.moe::Experts`` node for each layer of the plan, known by its attribute ``layer``.
Ensures: no Experts node is left, and a ``rq.moe::MoeLayer`` named ``{layer}.moe`` stands for each layer with computed slots.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rq_compile.planning.schema import LayerPlan
from rq_compile.rewrite.constant_experts import constant_part
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.experts_to_slots import DOMAIN, EXPERTS_NODES, experts_nodes, replica_table
from rq_compile.rewrite.halves import in_half
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.slot_weights import SlotWeights, Source, group_of, section_of, slot_weights
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section, constant

NAME = "moe_layers"
OP = "MoeLayer"
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}


def moe_layers(graph: gs.Graph, plans: Sequence[LayerPlan], source: Source, half: np.dtype) -> tuple[list[Section], PassReport]:
    """Rewrite ``graph`` in place and return the weights it now refers to, a section for each layer, unread.

    ``half``: float16 or bfloat16, the type of inputs, outputs and float weights, whichever float format the plan names.

    Raises:
        UserError: a layer of the model is missing from the plan, or the other way round (the layer is named). A piece of the
            weights raises it for a weight that ``half`` cannot hold.
    """
    sections, report = [], PassReport(*EXPERTS_NODES)
    for plan, node in experts_nodes(graph, plans):
        computed = plan.without_constants
        projections = [projection(computed, name, source, half) for name in ("up", "down")] if computed.slots else []
        _replace(graph, node, plan, projections, half)
        sections.append(section_of(plan.name, projections))
        report.changed += 1
    graph.cleanup().toposort()
    ensures(NAME, not any(node.op == "Experts" for node in graph.nodes), "that no Experts node is left")
    return sections, report


def _replace(graph: gs.Graph, node: gs.Node, plan: LayerPlan, projections: list[SlotWeights], half: np.dtype) -> None:
    x, ids, gates = node.inputs
    (y,) = node.outputs
    node.outputs.clear()
    graph.nodes.remove(node)
    layer, geometry = f"{plan.name}.moe", plan.geometry
    if plan.constant_experts:
        ids, y = _add_constants(graph, plan, ids, gates, y)
        plan = plan.without_constants
    if not plan.slots:
        return
    formats = [group_of(slot.format) for slot in plan.slots]
    tables = {"replicas": replica_table(plan), "formats": np.array(formats, np.int32)}
    inputs = [gs.Constant(f"{plan.name}.{name}", values) for name, values in tables.items()]
    for name, weights in zip(("up", "down"), projections, strict=True):
        inputs.append(gs.Constant(f"{plan.name}.{name}.index", np.array(weights.index, np.int32)))
        inputs += [constant(weight) for weight in weights.inputs]

    op, element = Ops(graph, layer), onnx.helper.np_dtype_to_tensor_dtype(half)
    narrow = op("Cast", x, to=element)
    # ONNX does not infer the types of our ops.
    out = gs.Variable(f"{layer}.out", element, [None, geometry.hidden])
    numbers = {"alpha": float(geometry.alpha), "limit": float(geometry.limit), **_shares(plan)}
    attributes = {"formats": formats, "activation": geometry.activation, **numbers, **PLUGIN}
    graph.nodes.append(gs.Node(OP, layer, attributes, [narrow, ids, gates, *inputs], [out], domain=DOMAIN))
    op("Cast", out, to=onnx.TensorProto.FLOAT, out=y)


def _add_constants(
    graph: gs.Graph, plan: LayerPlan, ids: gs.Tensor, gates: gs.Tensor, y: gs.Tensor
) -> tuple[gs.Tensor, gs.Tensor]:
    """Compute ``y`` as the sum of the constant experts and of a new tensor. Returns the ids, with -1 for the experts that are
    constant, and this tensor."""
    op, experts = Ops(graph, f"{plan.name}.constants"), np.arange(plan.geometry.experts)
    if not plan.without_constants.slots:
        op("Identity", constant_part(op, plan, ids, gates), out=y)
        return ids, y
    computed = gs.Variable(f"{plan.name}.computed", np.dtype(np.float32), [None, plan.geometry.hidden])
    op("Add", computed, constant_part(op, plan, ids, gates), out=y)
    return op("Gather", np.where(np.isin(experts, plan.constant_experts), -1, experts), ids), computed


def _shares(plan: LayerPlan) -> dict[str, list[float]]:
    """The attribute ``shares``, or no attribute if the load of a slot is not known."""
    loads = [slot.load for slot in plan.slots]
    return {} if None in loads else {"shares": [float(load) for load in loads if load is not None]}


def projection(plan: LayerPlan, name: str, source: Source, half: np.dtype) -> SlotWeights:
    """One projection with its weights in the types that the node declares: packed ones in int8, float ones in ``half``."""
    described = slot_weights(plan, name, source, panels=False)
    declared = {weight.name: _declared(weight, half) for weight in described.inputs}

    def declared_piece(piece: Piece) -> Piece:
        weights = tuple(declared[weight.name] for weight in piece.weights)
        values = lambda: tuple(map(_in_type, piece.values(), weights))  # noqa: E731
        return Piece(weights, values, piece.memory)

    inputs = tuple(declared[weight.name] for weight in described.inputs)
    return SlotWeights(inputs, described.index, tuple(map(declared_piece, described.pieces)))


def _declared(weight: ExternalWeight, half: np.dtype) -> ExternalWeight:
    if weight.dtype == np.uint8:
        return replace(weight, dtype=np.dtype(np.int8))
    return replace(weight, dtype=half) if weight.name.endswith(".float_weights") else weight


def _in_type(values: np.ndarray, weight: ExternalWeight) -> np.ndarray:
    if values.dtype == np.uint8:
        return values.view(np.int8)
    return in_half(values, weight.dtype, weight.name) if weight.dtype.itemsize == 2 else values
