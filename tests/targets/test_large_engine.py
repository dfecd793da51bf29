"""Requirements of a large model: memory that does not grow with it, and a graph and a weights file of any size."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import python
from one_layer import LAYER, one_layer, plan_of

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.engine.library import library_path
from rq_compile.lowerings import Stock, lowering_of
from rq_compile.rewrite.weights import external_tensors
from rq_compile.targets.weights_file import ALIGNMENT, layout, locate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from generated_checkpoint import SMALL, Storage, generate

GIB = 2**30


def no_weights(layer: str, expert: int) -> NoReturn:
    raise AssertionError("a weight was read")


# Memory

PROGRAM = """
import json, resource, sys
from pathlib import Path
from typing import NoReturn
from rq_compile.architectures.model import Model
from rq_compile.export.export import export_graph
from rq_compile.planning.schema import LayerPlan, LayerPrediction, Plan, Slot
from rq_compile.targets.onnxruntime import Writing, compile_engine

def resident(which):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which)) * 1024

checkpoint = Model.open(sys.argv[1])
predicted = LayerPrediction(
    lis_before=1, lis_after=1, strict_lis_before=1, strict_lis_after=1, bytes_before=1, bytes_after=1, error=0
)
formats = ("bf16", "int8", "int4", "bf16")
layers = [
    LayerPlan(
        name=layer.name, index=layer.index, geometry=layer.geometry, predicted=predicted,
        slots=[Slot(expert=e, format=formats[e % 4]) for e in range(layer.geometry.experts)],
    )
    for layer in checkpoint.layers
]
plan = Plan(
    tool="test", model="m", model_type="olmoe", fingerprint=checkpoint.fingerprint, calibration_sha256=None, policy="none",
    target="cpu", memory=1.0, layers=layers,
)
exported = export_graph(checkpoint)
before, whole = resident("VmRSS"), resident("VmHWM")
open("/proc/self/clear_refs", "w").write("5")
manifest = compile_engine(checkpoint, plan, Path(sys.argv[2]), exported=exported, writing=Writing(threads=2))
peak = resident("VmHWM")
# Not from getrusage, which also counts the memory of the parent process before exec.
print(json.dumps([before, peak, max(whole, peak), manifest.weights.bytes]))
"""


@pytest.mark.parametrize("storage", ["bf16", "fp8", "mxfp4"])
def test_compiling_takes_the_memory_of_two_layers(storage: Storage, tmp_path: Path) -> None:
    """In addition to the program and the graph, less than 1 GiB. Holding the model, or its engine, would take more. Layers
    count as in bf16, even if the checkpoint stores them in fewer bytes. Two layers must be much more than the memory that does
    not depend on the model: buffers of files, and code that is loaded only now."""
    model = replace(SMALL, experts=64)
    folder = generate(replace(model, storage=storage), tmp_path / "model", shard_bytes=10**8)
    assert model.bytes > 4 * model.layer_bytes
    process = python("-c", PROGRAM, str(folder), str(tmp_path / "model.onnx"))
    output, error = process.communicate()
    assert process.returncode == 0, error
    before, peak, whole_peak, written = json.loads(output)
    assert written > 2 * model.layer_bytes
    assert peak - before <= 2 * model.layer_bytes
    assert whole_peak <= 2 * model.layer_bytes + GIB


# Size

MIXTRAL = ExpertGeometry(experts=40, top_k=2, hidden=4096, intermediate=14336, activation="swiglu")


def external_data(tensor: onnx.TensorProto) -> dict[str, int]:
    return {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}


@pytest.mark.parametrize("lowering", ["native", "stock", "batched"])
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_tensors_of_more_than_two_gigabytes(lowering: str, format: str) -> None:
    plan = plan_of(MIXTRAL, [(expert, format) for expert in range(40)])
    lowered = lowering_of(lowering).lower(one_layer(MIXTRAL.hidden, MIXTRAL.top_k), plan, no_weights)
    model, sections = lowered.model, lowered.experts
    places = layout(sections)
    weights = [weight for section in sections for weight in section.weights]
    assert max(weight.bytes for weight in weights) > 2**31
    assert all(start % ALIGNMENT == 0 for start in places.starts.values())
    ends = [places.starts[weight.name] + weight.bytes for weight in weights]
    assert all(end <= start for end, start in zip(ends, list(places.starts.values())[1:], strict=False))
    locate(model, places.starts, "layer.data")
    found = [external_data(tensor) for tensor in external_tensors(model.graph)]
    assert sum(data["length"] for data in found) == sum(weight.bytes for weight in weights)
    assert max(data["offset"] + data["length"] for data in found) == places.bytes > 2**31
    assert model.ByteSize() < 2**20


def test_a_graph_of_thousands_of_nodes() -> None:
    """128 slots in stock ops: the largest graph. It stays far below the 2 GiB that protobuf allows."""
    geometry = ExpertGeometry(experts=128, top_k=8, hidden=2048, intermediate=768, activation="swiglu")
    plan = plan_of(geometry, [(expert, "int4") for expert in range(128)])
    model = Stock().lower(one_layer(2048, 8), plan, no_weights).model

    def nodes(graph: onnx.GraphProto) -> int:
        below = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
        return len(graph.node) + sum(map(nodes, below))

    assert 94 * nodes(model.graph) > 100_000  # as many layers as Qwen3-235B has
    assert 94 * model.ByteSize() < 2**28


@pytest.mark.parametrize("lowering", ["native", "stock"])
def test_onnx_runtime_maps_weights_of_more_than_two_gigabytes(tmp_path: Path, lowering: str) -> None:
    """The file is one hole, which reads as zeros; if it were read rather than mapped, the resident memory would show it."""
    plan = plan_of(MIXTRAL, [(expert, "int8") for expert in range(40)])
    lowered = lowering_of(lowering).lower(one_layer(MIXTRAL.hidden, MIXTRAL.top_k), plan, no_weights)
    model, sections = lowered.model, lowered.experts
    places = layout(sections)
    locate(model, places.starts, "layer.data")
    onnx.save(model, tmp_path / "layer.onnx")
    with (tmp_path / "layer.data").open("wb") as file:
        file.truncate(places.bytes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if lowering == "native":
        options.register_custom_ops_library(str(library_path()))
    before = resident()
    session = onnxruntime.InferenceSession(str(tmp_path / "layer.onnx"), options, providers=["CPUExecutionProvider"])
    assert resident() - before < GIB // 4
    ids = np.array([[39, 17]])
    x, gates = np.ones((1, MIXTRAL.hidden), np.float32), np.ones((1, 2), np.float32)
    (y,) = session.run(["y"], {"x": x, "ids": ids, "gates": gates})
    np.testing.assert_array_equal(y, np.zeros_like(x))
    assert LAYER in model.graph.node[0].name


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024
