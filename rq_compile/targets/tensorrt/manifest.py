"""The manifest of a TensorRT engine, ``<engine stem>.json`` beside it: an engine answers no question without a GPU, this does."""

from typing import Literal

import onnx
from pydantic import Field

from rq_compile.files import Document
from rq_compile.planning.schema import Plan
from rq_compile.targets.manifest import EngineFile
from rq_compile.targets.tensorrt.profiles import Profile

TensorRTTarget = Literal["tensorrt", "tensorrt-rtx"]


class Binding(Document):
    """An input or output of the engine; free axes have names."""

    name: str
    dtype: str
    shape: list[int | str]


class Built(Document):
    """What the builder said: the layers of the network that it read and of the engine that it made, by kind; for each profile the
    bytes of scratch memory."""

    builder: str
    compute_capabilities: list[int]
    bytes: int
    parse_seconds: float
    build_seconds: float
    network_layers: dict[str, int]
    engine_layers: dict[str, int]
    scratch_bytes: list[int]
    weight_bytes: int


class TensorRTManifest(Document):
    """``built`` is None where only what a builder needs was written. ``files``: those beside this one, by what they are."""

    schema_version: Literal[1] = 1
    kind: Literal["engine"] = "engine"
    tool: str
    target: TensorRTTarget
    precision: Literal["fp16", "bf16"]
    lowering: Literal["batched", "plugins"] = Field(default="batched", description="of MoE layers: standard ops, or plugins")
    compute_capabilities: list[int] = Field(description="asked for, 89 for 8.9; none: that of the machine that builds")
    files: dict[str, EngineFile]
    inputs: list[Binding]
    outputs: list[Binding]
    profiles: list[Profile]
    built: Built | None
    replaced: dict[str, int]
    remarks: list[str] = Field(default=[], description="differences between the checkpoint's config and tensors")
    plan: Plan


def bindings(values: "list[onnx.ValueInfoProto]") -> list[Binding]:
    """Inputs or outputs of a graph."""
    return [
        Binding(
            name=value.name,
            dtype=str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            shape=[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]
