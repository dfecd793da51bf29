"""Lowering ``cuda``: each MoE layer is one node of ``librq_moe_cuda.so``, in ONNX Runtime's CUDA provider."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from rq_compile.engine.library import CUDA_LIBRARY
from rq_compile.lowerings.moe_layer import MoeLayerNode
from rq_compile.quantization.formats import FLOAT_FORMATS

if TYPE_CHECKING:
    import onnx

    from rq_compile.engine.library import OpLibrary
    from rq_compile.lowerings.lowering import Lowered
    from rq_compile.planning.schema import Plan
    from rq_compile.planning.targets import Target
    from rq_compile.quantization.formats import Format
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.slot_weights import Source


@dataclass(frozen=True)
class Cuda(MoeLayerNode):
    """Experts compute in 16 bits between two casts; everything else computes in fp32."""

    name: ClassVar[str] = "cuda"
    summary: ClassVar[str] = "needs the op library of plugins/cuda and is the default for a plan with the target cuda"
    planned_for: ClassVar[Target] = "cuda"
    default_for: ClassVar[tuple[Target, ...]] = ("cuda",)
    device: ClassVar[Literal["cuda"]] = "cuda"
    library: ClassVar[OpLibrary] = CUDA_LIBRARY
    rounds_dense: ClassVar[bool] = True
    otherwise: ClassVar[str] = "compile with --lowering native"

    def for_checkpoint(self, dtype: Format) -> Self:
        return replace(self, half="bf16" if dtype == "bf16" else "fp16")

    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        lowered = super().lower(model, plan, source, dense)
        floats = [slot.format for layer in plan.layers for slot in layer.slots if slot.format in FLOAT_FORMATS]
        lowered.replaced[f"float slots kept in {self.half}"] = sum(format != self.half for format in floats)
        return lowered
