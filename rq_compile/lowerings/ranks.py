"""Lowering ``ranks``: an engine of several processes, one for each rank of the plan, which exchange rows with MPI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from rq_compile.lowerings.native import Native

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_graphsurgeon as gs

    from rq_compile.planning.schema import LayerPlan, Plan
    from rq_compile.planning.targets import Target
    from rq_compile.rewrite.report import PassReport
    from rq_compile.rewrite.slot_weights import Source
    from rq_compile.rewrite.weights import ExternalWeight, Section


@dataclass(frozen=True)
class Ranks(Native):
    """As ``native``, for the slots of ``rank``. Each rank runs its own sequences; their rows go to the ranks of their slots."""

    rank: int = 0

    name: ClassVar[str] = "ranks"
    summary: ClassVar[str] = "writes a folder for one process per rank, which needs MPI"
    default_for: ClassVar[tuple[Target, ...]] = ("cpu",)
    of_ranks: ClassVar[bool] = True

    def of_processes(self, plan: Plan) -> list[Self]:
        return [replace(self, rank=rank) for rank in range(plan.ranks)]

    def moe_layers(self, graph: gs.Graph, plan: Plan, source: Source) -> tuple[list[Section], PassReport]:
        from rq_compile.rewrite.exchange import exchange

        bits = self.activation_bits
        return exchange(graph, plan.layers, source, rank=self.rank, ranks=plan.ranks, activation_bits=bits)

    def expert_sections(self, layers: Sequence[LayerPlan], source: Source) -> list[Section]:
        from rq_compile.rewrite.exchange import slots_of

        return super().expert_sections([slots_of(layer, self.rank) for layer in layers], source)

    def expert_weights(self, layer: LayerPlan) -> list[ExternalWeight]:
        ranks = sorted({slot.rank for slot in layer.without_constants.slots} or {0})
        return [weight for rank in ranks for weight in super(Ranks, replace(self, rank=rank)).expert_weights(layer)]
