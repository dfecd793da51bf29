"""Lowering ``batched``: slots are lanes of batched products, in standard ONNX ops; for large batches and for TensorRT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rq_compile.lowerings.lowering import Lowered, Lowering, with_mean_outputs
from rq_compile.quantization.formats import SLOT_FORMATS

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from rq_compile.planning.schema import LayerPlan, Plan
    from rq_compile.planning.targets import Target
    from rq_compile.quantization.formats import Format
    from rq_compile.rewrite.batched_experts import ExpectedCapacity
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.report import PassReport
    from rq_compile.rewrite.slot_weights import Source
    from rq_compile.rewrite.weights import Section

# ONNX Runtime would cast 16-bit weights to fp32 when it loads them. Up to this size, it may fold constants.
FOLDING_LIMIT = {"optimization.constant_folding_max_output_size_in_bytes": "65536"}
PRODUCT_BYTES = 8_200  # of the graph


@dataclass(frozen=True)
class Batched(Lowering):
    """``expected`` and ``whole_columns`` are for targets that must know shapes before values: see ``batched_experts``."""

    expected: ExpectedCapacity | None = None
    whole_columns: bool = False

    name: ClassVar[str] = "batched"
    summary: ClassVar[str] = "is plain ONNX, for large batches"
    planned_for: ClassVar[Target] = "batched"
    held_as: ClassVar[Mapping[Format, Format]] = {"mxfp4": "int8", "fp8": "fp32"}
    session_options: ClassVar[Mapping[str, str]] = FOLDING_LIMIT

    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        from rq_compile.rewrite.batched_experts import batched_experts
        from rq_compile.rewrite.experts_to_slots import experts_to_slots
        from rq_compile.rewrite.rewrite import counts, exported, imported
        from rq_compile.rewrite.stock_combine import stock_combine
        from rq_compile.rewrite.stock_dispatch import stock_dispatch

        graph, layers = imported(model), [self.held(layer) for layer in plan.layers]
        _, rewritten = experts_to_slots(graph, layers, None)
        reports = [rewritten, stock_dispatch(graph), stock_combine(graph)]
        experts, in_lanes = batched_experts(graph, layers, source, self.expected, whole_columns=self.whole_columns)
        experts = with_mean_outputs(experts, layers, source)
        reports += [in_lanes, *self.last_passes(graph)]
        return Lowered(exported(graph), experts, [], reports, counts(plan) | self.held_differently(plan))

    def held_differently(self, plan: Plan) -> dict[str, int]:
        """With the slots that are held in tensors of a format with more bits, because ONNX has none with theirs."""
        held = [SLOT_FORMATS[slot.format] for layer in plan.layers for slot in self.held(layer).slots]
        wider = Counter((format.name, format.element) for format in held if format.quantized and format.name != format.element)
        return super().held_differently(plan) | {
            f"{name} slots held as {element}": count for (name, element), count in wider.items()
        }

    def last_passes(self, graph: gs.Graph) -> list[PassReport]:
        """Passes that only one target needs; they run after all others."""
        return []

    def computed_section(self, layer: LayerPlan, source: Source) -> Section:
        from rq_compile.rewrite.batched_experts import lanes_section

        return lanes_section(self.held(layer), source, whole_columns=self.whole_columns)

    def graph_bytes(self, slots: int, products: int) -> int:
        return PRODUCT_BYTES * products
