"""Pass: every Experts node becomes the part of one rank: ExchangeDispatch, ExpertGemm (up), ExpertGemm (down), ExchangeReturn,
Combine, with the weights of the rank's slots.

Requires: one ``rq.moe::Experts`` node for each layer of the plan, known by its attribute ``layer``.
Ensures: no Experts node is left, each layer's tensor ``{layer}.slot_offsets`` exists, and the graph has the input ``idle``.
"""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.engine.ranks import IDLE
from rq_compile.planning.schema import LayerPlan
from rq_compile.rewrite.constant_experts import combine_inputs
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.experts_to_slots import EXPERTS_NODES, SlotNodes, experts_nodes, offsets_name, replica_table
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.slot_weights import Source
from rq_compile.rewrite.weights import Section

NAME = "exchange"
# A domain of its own, because a session refuses two libraries that add ops to one domain.
EXCHANGE_DOMAIN = "rq.moe.mpi"


def slots_of(plan: LayerPlan, rank: int) -> LayerPlan:
    """The layer with the slots of ``rank`` only, of which there may be none, and all constant ones, which every rank has."""
    return plan.model_copy(update={"slots": [slot for slot in plan.slots if slot.rank == rank or not slot.computed]})


def exchange(
    graph: gs.Graph, plans: Sequence[LayerPlan], source: Source, *, rank: int, ranks: int, activation_bits: int = 32
) -> tuple[list[Section], PassReport]:
    """Rewrite ``graph`` in place into that of ``rank``, and return the weights of its slots, a section for each layer, unread.

    Raises:
        UserError: see ``experts_nodes``.
    """
    idle = gs.Variable(IDLE, np.dtype(np.int64), [1])
    graph.inputs.append(idle)
    sections, report = [], PassReport(*EXPERTS_NODES)
    for plan, node in experts_nodes(graph, plans):
        own = SlotNodes(graph, slots_of(plan, rank).without_constants, source, activation_bits=activation_bits)
        _replace(own, node, plan, idle, rank, ranks)
        sections.append(own.section)
        report.changed += 1
    graph.cleanup().toposort()
    ensures(NAME, not any(node.op == "Experts" for node in graph.nodes), "that no Experts node is left")
    ensures(NAME, {offsets_name(plan.name) for plan in plans} <= set(graph.tensors()), "slot_offsets for every layer")
    return sections, report


def _replace(own: SlotNodes, node: gs.Node, whole: LayerPlan, idle: gs.Variable, rank: int, ranks: int) -> None:
    x, ids, gates = node.inputs
    (y,) = node.outputs
    node.outputs.clear()
    arrived, back = own.tensor("arrived", np.float32), own.tensor("returned", np.float32)
    rows, outgoing, exchanged = (own.tensor(name, np.int32) for name in ("rows", "outgoing", "exchanged"))
    held = sum(slot.rank == rank for slot in whole.slots)
    offsets = gs.Variable(offsets_name(whole.name), np.dtype(np.int32), [held + 1])
    computed = {"computed": len(whole.without_constants.slots)} if whole.constant_experts else {}
    own.add(
        "ExchangeDispatch",
        [x, ids, gs.Constant(f"{whole.name}.replicas", replica_table(whole)), idle],
        [arrived, rows, offsets, outgoing, exchanged],
        "dispatch",
        EXCHANGE_DOMAIN,
        ranks=[slot.rank for slot in whole.slots],
        rank=rank,
        size=ranks,
        **computed,
    )
    # A rank without slots gets no rows, and returns none.
    out = own.products(arrived, rows, offsets) if own.plan.slots else arrived
    own.add("ExchangeReturn", [out, rows, outgoing, exchanged], [back], "return", EXCHANGE_DOMAIN)
    own.add("Combine", [back, outgoing, gates, *combine_inputs(whole, ids)], [y], "combine")
