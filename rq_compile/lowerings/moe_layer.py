"""Common parts of the lowerings of GPU libraries: each MoE layer is one node ``rq.moe::MoeLayer`` in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rq_compile.lowerings.lowering import OF_THE_OP_SET, Lowered, Lowering, with_mean_outputs
from rq_compile.quantization.formats import FLOAT_FORMATS

if TYPE_CHECKING:
    import onnx

    from rq_compile.planning.schema import LayerPlan, Plan
    from rq_compile.quantization.formats import Format
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.report import PassReport
    from rq_compile.rewrite.slot_weights import Source
    from rq_compile.rewrite.weights import Section

Half = Literal["fp16", "bf16"]


@dataclass(frozen=True)
class MoeLayerNode(Lowering):
    """``half``: the 16-bit type in which the node computes and float slots are stored."""

    half: Half = "fp16"
    activation_bits: int = 16

    formats: ClassVar[tuple[Format, ...]] = OF_THE_OP_SET
    counts_rows: ClassVar[bool] = False  # slots are inside the node
    otherwise: ClassVar[str]  # what to do with a layer that the kernels do not support

    def held(self, layer: LayerPlan) -> LayerPlan:
        """With slots in fp8 in ``half``, if the kernels for fp8 do not support the layer's blocks, or the other formats in it."""
        from rq_compile.lowerings.kernel_sizes import supports_fp8

        layer = super().held(layer)
        if supports_fp8(layer.without_constants):
            return layer
        slots = [
            slot.model_copy(update={"format": self.half}) if slot.format in ("fp8", *FLOAT_FORMATS) else slot
            for slot in layer.slots
        ]
        return layer.model_copy(update={"slots": slots})

    def check_layer(self, layer: LayerPlan) -> None:
        from rq_compile.lowerings.kernel_sizes import check_kernel_sizes

        check_kernel_sizes(self.held(layer.without_constants), self.otherwise)

    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        from rq_compile.rewrite.dequantized_dense import dequantized_dense
        from rq_compile.rewrite.halves import HALVES
        from rq_compile.rewrite.moe_layers import moe_layers
        from rq_compile.rewrite.quantized_tables import quantized_tables
        from rq_compile.rewrite.rewrite import counts, exported, imported

        graph = imported(model)
        matrices: list[Section] = []
        reports: list[PassReport] = []
        if dense is not None and dense.by_plan:
            for sections, rounded in (quantized_tables(graph, dense), dequantized_dense(graph, dense)):
                matrices += sections
                reports.append(rounded)
        layers = [self.held(layer) for layer in plan.layers]
        experts, report = moe_layers(graph, layers, source, HALVES[self.half])
        experts = with_mean_outputs(experts, layers, source)
        replaced = counts(plan) | self.held_differently(plan)
        return Lowered(exported(graph), experts, matrices, [*reports, report], replaced)

    def computed_section(self, layer: LayerPlan, source: Source) -> Section:
        from rq_compile.rewrite.halves import HALVES
        from rq_compile.rewrite.moe_layers import projection
        from rq_compile.rewrite.slot_weights import section_of

        held, half = self.held(layer), HALVES[self.half]
        return section_of(layer.name, (projection(held, name, source, half) for name in ("up", "down")))
