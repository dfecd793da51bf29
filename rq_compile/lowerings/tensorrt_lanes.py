"""Lowering ``batched`` for TensorRT: shapes are known before values, and its builders keep the weights packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rq_compile.lowerings.batched import Batched
from rq_compile.quantization.formats import SLOT_FORMATS

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from rq_compile.lowerings.lowering import Lowered
    from rq_compile.planning.schema import Plan
    from rq_compile.planning.targets import Target
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.report import PassReport
    from rq_compile.rewrite.slot_weights import Source


@dataclass(frozen=True)
class TensorRTLanes(Batched):
    """``expected`` is required; int8 has one scale per column."""

    whole_columns: bool = True

    planned_for: ClassVar[Target] = "tensorrt-rtx"

    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        lowered = super().lower(model, plan, source, dense)
        slots = [slot for layer in plan.layers for slot in self.held(layer).slots]
        int8 = sum(SLOT_FORMATS[slot.format].element == "int8" for slot in slots)
        lowered.replaced["int8 slots with a scale for each column"] = int8
        return lowered

    def last_passes(self, graph: gs.Graph) -> list[PassReport]:
        from rq_compile.rewrite.loop_weights import loop_weights

        return [loop_weights(graph)]
