"""One layer with every format, in 16 bits, as in the network for TensorRT."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from one_layer import LAYER, MIXED, one_layer, plan_of, random_experts

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.lowerings import TensorRTLanes
from rq_compile.rewrite.batched_experts import ExpectedCapacity
from rq_compile.rewrite.halves import HALVES
from rq_compile.targets.tensorrt.half_precision import half_precision
from rq_compile.targets.tensorrt.narrow import in_versions
from rq_compile.targets.weights_file import locate, write_weights

GEOMETRY = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=48, activation="swiglu", bias=True)
EXPERTS = random_experts(GEOMETRY)


def layer_in_half(folder: Path, half: str = "fp16", slots: Sequence[tuple[int, str]] = MIXED) -> onnx.ModelProto:
    """One layer with every format, whose lanes are so narrow that it needs further passes, and its weights."""
    lanes = TensorRTLanes(ExpectedCapacity(headroom=0.3, least=2))
    lowered = lanes.lower(one_layer(32, 2), plan_of(GEOMETRY, slots), lambda _, e: EXPERTS[e])
    model, versions, _ = half_precision(lowered.model, HALVES[half], layers=[LAYER])
    with (folder / "layer.data").open("wb") as file:
        written = write_weights([in_versions(section, versions) for section in lowered.experts], file)
    locate(model, written.starts, "layer.data")
    onnx.save(model, folder / "layer.onnx")
    return model
