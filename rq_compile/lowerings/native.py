"""Lowering ``native``: the custom ops of ``librq_moe.so`` on the CPU, together with ONNX Runtime's fused norms and rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rq_compile.engine.library import CPU_LIBRARY
from rq_compile.lowerings.lowering import OF_THE_OP_SET, Lowered, Lowering, with_mean_outputs

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from rq_compile.engine.library import OpLibrary
    from rq_compile.planning.schema import LayerPlan, Plan
    from rq_compile.planning.targets import Target
    from rq_compile.quantization.formats import DenseFormat, Format
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.report import PassReport
    from rq_compile.rewrite.slot_weights import Source
    from rq_compile.rewrite.weights import Section


@dataclass(frozen=True)
class Native(Lowering):
    """``activation_bits``: 8 rounds the inputs of quantized weights to int8 and those of bf16 weights to bf16, 32 keeps them in
    fp32. ``dense_format``: see ``dense_gemms``."""

    activation_bits: int = 32
    dense_format: DenseFormat = "stored"

    name: ClassVar[str] = "native"
    summary: ClassVar[str] = "needs the op library of rq-compile"
    planned_for: ClassVar[Target] = "cpu"
    options: ClassVar[tuple[str, ...]] = ("activation_bits", "dense_format")
    formats: ClassVar[tuple[Format, ...]] = OF_THE_OP_SET
    library: ClassVar[OpLibrary] = CPU_LIBRARY
    rounds_dense: ClassVar[bool] = True
    layer_bytes: ClassVar[int] = 9_000  # its passes fuse nodes

    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        from rq_compile.rewrite.attention import attention
        from rq_compile.rewrite.batch_shapes import batch_shapes
        from rq_compile.rewrite.cache_lengths import cache_lengths
        from rq_compile.rewrite.causal_masks import causal_masks
        from rq_compile.rewrite.dense_gemms import dense_gemms
        from rq_compile.rewrite.embedding_tables import embedding_tables
        from rq_compile.rewrite.latent_attention import latent_attention
        from rq_compile.rewrite.quantized_tables import quantized_tables
        from rq_compile.rewrite.residual_norms import residual_norms
        from rq_compile.rewrite.rewrite import counts, exported, imported
        from rq_compile.rewrite.rms_norms import rms_norms
        from rq_compile.rewrite.rotary_embeddings import rotary_embeddings
        from rq_compile.rewrite.rotated_attention import rotated_attention
        from rq_compile.rewrite.same_shapes import same_shapes

        graph = imported(model)
        matrices: list[Section] = []
        reports: list[PassReport] = []
        latent: list[PassReport] = []
        if dense is not None:
            matrices, report = latent_attention(graph, self.dense_format, dense)
            latent = [report] if report.matches else []
        if dense is not None and self.dense_format != "fp32":
            reports.append(embedding_tables(graph, dense.dtype_of, lambda name: dense.rounded(name, table=True) is not None))
            tables, rounded = quantized_tables(graph, dense)
            reports += [rounded] if tables else []
            products, multiplied = dense_gemms(graph, self.dense_format, dense, self.activation_bits)
            reports.append(multiplied)
            matrices += tables + products
        experts, rewritten = self.moe_layers(graph, plan, source)
        reports += [rewritten, rms_norms(graph), residual_norms(graph), rotary_embeddings(graph), *latent, attention(graph)]
        reports += [rotated_attention(graph), cache_lengths(graph), causal_masks(graph), same_shapes(graph), batch_shapes(graph)]
        experts = with_mean_outputs(experts, plan.layers, source)
        return Lowered(exported(graph), experts, matrices, reports, counts(plan))

    def moe_layers(self, graph: gs.Graph, plan: Plan, source: Source) -> tuple[list[Section], PassReport]:
        """Replace the Experts nodes of ``graph`` and return the weights of the slots."""
        from rq_compile.rewrite.experts_to_slots import experts_to_slots

        return experts_to_slots(graph, plan.layers, source, activation_bits=self.activation_bits)

    def computed_section(self, layer: LayerPlan, source: Source) -> Section:
        from rq_compile.rewrite.slot_weights import section_of, slot_weights

        return section_of(layer.name, (slot_weights(layer, name, source, panels=True) for name in ("up", "down")))
