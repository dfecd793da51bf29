"""Lowering ``plugins``: each MoE layer is one plugin of ``librq_tensorrt.so``, which is embedded in the TensorRT engine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rq_compile.lowerings.moe_layer import MoeLayerNode

if TYPE_CHECKING:
    from rq_compile.planning.targets import Target


@dataclass(frozen=True)
class Plugins(MoeLayerNode):
    """The whole network computes in ``half``."""

    name: ClassVar[str] = "plugins"
    summary: ClassVar[str] = "needs the plugin library of plugins/tensorrt"
    planned_for: ClassVar["Target"] = "tensorrt"
    carries_code: ClassVar[bool] = True
    otherwise: ClassVar[str] = "compile with --stock"
