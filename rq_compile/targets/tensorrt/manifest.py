"""The manifest of a TensorRT engine, ``<engine stem>.json`` beside it. Unlike the engine, it can be read without a GPU."""

from typing import Annotated, ClassVar, Literal

import onnx
from pydantic import Field

from rq_compile.bounds import MOST_COUNTED, Count, NonNegative
from rq_compile.engine.manifest import EngineFile
from rq_compile.files import Document
from rq_compile.lowerings import TENSORRT_LOWERINGS
from rq_compile.planning.schema import Plan
from rq_compile.targets.tensorrt.profiles import Profile
from rq_compile.versions import Upgrade, Versioned, same_keys

ComputeCapability = Annotated[int, Field(ge=10, le=999)]
TensorRTTarget = Literal["tensorrt", "tensorrt-rtx"]


class Binding(Document):
    """An input or output of the engine; free axes have names."""

    name: str
    dtype: str
    shape: list[Annotated[int, Field(ge=0, le=MOST_COUNTED)] | str]


class Built(Document):
    """What the builder reported: the layers of the network it read and of the engine it made, by kind; and, for each profile, the
    bytes of scratch memory."""

    builder: str
    compute_capabilities: list[ComputeCapability]
    bytes: Count
    parse_seconds: NonNegative
    build_seconds: NonNegative
    network_layers: dict[str, Count]
    engine_layers: dict[str, Count]
    scratch_bytes: list[Count]
    weight_bytes: Count


class TensorRTManifest(Versioned):
    """``built`` is None if only the builder's input was written. ``files``: the files beside this one, by their role."""

    called: ClassVar[str] = "manifest of a TensorRT engine"
    command: ClassVar[str] = "rq-compile compile"
    upgrades: ClassVar[dict[int, Upgrade]] = {1: same_keys}

    schema_version: Literal[2] = 2
    kind: Literal["engine"] = "engine"
    tool: str
    target: TensorRTTarget
    precision: Literal["fp16", "bf16"]
    lowering: Literal["batched", "plugins"] = Field(default="batched", description="of MoE layers: standard ops, or plugins")
    compute_capabilities: list[ComputeCapability] = Field(
        description="asked for, 89 for 8.9; none: that of the machine that builds"
    )
    files: dict[str, EngineFile]
    inputs: list[Binding]
    outputs: list[Binding]
    profiles: list[Profile]
    built: Built | None
    replaced: dict[str, Count]
    remarks: list[str] = Field(default=[], description="differences between the checkpoint's config and tensors")
    recomputed_beyond: Count | None = Field(
        default=None, description="a cache of at most so many tokens is not continued beyond them: all are computed anew"
    )
    plan: Plan

    @property
    def carries_code(self) -> bool:
        """Whether the engine contains the code of plugins. A server runs it only if it is told to."""
        return TENSORRT_LOWERINGS[self.lowering].carries_code


def bindings(values: "list[onnx.ValueInfoProto]") -> list[Binding]:
    """The bindings of a graph's inputs or outputs."""
    return [
        Binding(
            name=value.name,
            dtype=str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            shape=[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]
