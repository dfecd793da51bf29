"""Lowering ``stock``: an ``If`` for each slot, with ops that any ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rq_compile.lowerings.lowering import Lowered, Lowering, with_mean_outputs

if TYPE_CHECKING:
    import onnx

    from rq_compile.planning.schema import LayerPlan, Plan
    from rq_compile.planning.targets import Target
    from rq_compile.quantization.formats import Format
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.report import PassReport
    from rq_compile.rewrite.slot_weights import Source
    from rq_compile.rewrite.weights import Section

SLOT_BYTES = 4_500  # bytes of a slot in the graph
ROUNDED = 4  # the accuracy_level of MatMulNBits that rounds its inputs to int8


@dataclass(frozen=True)
class Stock(Lowering):
    """``activation_bits``: 8 lets ``MatMulNBits`` round its inputs to int8, 32 keeps them in fp32."""

    activation_bits: int = 32

    name: ClassVar[str] = "stock"
    summary: ClassVar[str] = "runs in any ONNX Runtime"
    planned_for: ClassVar[Target] = "cpu"
    # MatMulNBits takes 2 bits too, but with fp32 activations it is then many times slower (ONNX Runtime 1.32).
    held_as: ClassVar[Mapping[Format, Format]] = {"mxfp4": "int8", "fp8": "fp32", "int3": "int4", "int2": "int4"}
    options: ClassVar[tuple[str, ...]] = ("activation_bits",)
    rounds_dense: ClassVar[bool] = True

    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        from rq_compile.rewrite.experts_to_slots import experts_to_slots
        from rq_compile.rewrite.quantized_tables import quantized_tables
        from rq_compile.rewrite.rewrite import counts, exported, imported
        from rq_compile.rewrite.stock_combine import stock_combine
        from rq_compile.rewrite.stock_dense import stock_dense
        from rq_compile.rewrite.stock_dispatch import stock_dispatch
        from rq_compile.rewrite.stock_experts import stock_experts

        graph, layers = imported(model), [self.held(layer) for layer in plan.layers]
        matrices: list[Section] = []
        rounded: list[PassReport] = []
        level = ROUNDED if self.activation_bits == 8 else 0
        if dense is not None and dense.by_plan:
            for sections, report in (quantized_tables(graph, dense), stock_dense(graph, dense, level)):
                matrices += sections
                rounded.append(report)
        experts, rewritten = experts_to_slots(graph, layers, source, panels=False, activation_bits=self.activation_bits)
        reports = [*rounded, rewritten, stock_dispatch(graph), stock_combine(graph)]
        reports.append(stock_experts(graph, layers, accuracy_level=level))
        experts = with_mean_outputs(experts, layers, source)
        return Lowered(exported(graph), experts, matrices, reports, counts(plan) | self.held_differently(plan))

    def computed_section(self, layer: LayerPlan, source: Source) -> Section:
        from rq_compile.rewrite.slot_weights import section_of, slot_weights

        held = self.held(layer)
        return section_of(layer.name, (slot_weights(held, name, source, panels=False) for name in ("up", "down")))

    def graph_bytes(self, slots: int, products: int) -> int:
        return SLOT_BYTES * slots
