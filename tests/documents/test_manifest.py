"""An engine's manifest describes its files correctly."""

from collections import Counter
from pathlib import Path

import onnx
import pytest

from rq_compile.engine.library import OP_SET_VERSION
from rq_compile.engine.manifest import Manifest
from rq_compile.files import sha256
from rq_compile.quantization.formats import COMPUTED_FORMATS, FORMATS, matrix_bytes
from rq_compile.runtime.files import read_manifest
from rq_compile.targets.weights_file import ALIGNMENT


@pytest.fixture(scope="module")
def manifest(stages: Path) -> Manifest:
    return read_manifest(stages / "model.onnx")


@pytest.fixture(scope="module")
def graph(stages: Path) -> onnx.GraphProto:
    return onnx.load(stages / "model.onnx", load_external_data=False).graph


def test_it_lists_every_file_with_its_hash(manifest: Manifest, stages: Path) -> None:
    files = {file.name: file for file in manifest.files}
    assert {path.name for path in stages.glob("model.*")} == {*files, "model.json"}
    for name, file in files.items():
        assert file.bytes == (stages / name).stat().st_size
        assert file.sha256 == sha256(stages / name)


def test_it_says_what_is_needed_to_load_the_graph(manifest: Manifest, stages: Path) -> None:
    model = onnx.load(stages / "model.onnx", load_external_data=False)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert manifest.opset == versions[""]
    assert manifest.op_library == OP_SET_VERSION == versions["rq.moe"]


def test_its_cache_is_the_graphs(manifest: Manifest, graph: onnx.GraphProto) -> None:
    inputs = {value.name: value for value in graph.input}
    outputs = {value.name for value in graph.output}
    named = {"input_ids", "attention_mask", "position_ids", "logits_to_keep"}
    assert inputs.keys() == {*named, *(tensor.past for tensor in manifest.cache)}
    assert outputs == {"logits", *(tensor.present for tensor in manifest.cache)}
    for tensor in manifest.cache:
        dimensions = inputs[tensor.past].type.tensor_type.shape.dim
        assert [dimension.dim_param or dimension.dim_value for dimension in dimensions] == tensor.shape
        assert (tensor.shape[0], tensor.shape[2]) == ("batch", "past")
    logits = next(value for value in graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[2].dim_value == manifest.vocabulary


def test_its_bytes_are_those_of_the_weights_file(manifest: Manifest, graph: onnx.GraphProto) -> None:
    """Apart from the weights, the file has only gaps for alignment, and the graph contains no weights."""
    written = manifest.expert_bytes + manifest.dense_bytes
    assert written <= manifest.weights.bytes < written + ALIGNMENT * len(graph.initializer)
    assert manifest.expert_bytes <= manifest.plan.memory * manifest.plan.bytes_before
    inside = sum(tensor.ByteSize() for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL)
    assert inside < 10_000


def test_its_experts_take_the_bytes_that_were_planned_less_the_aliases(manifest: Manifest) -> None:
    """The native lowering stores copies of an expert in the same format only once."""
    stored = 0
    for layer in manifest.plan.layers:
        geometry = layer.geometry
        matrices = ((geometry.up_rows, geometry.hidden), (geometry.hidden, geometry.intermediate))
        each = {format: sum(matrix_bytes(format, *matrix) for matrix in matrices) for format in COMPUTED_FORMATS}
        assert layer.predicted.bytes_after == sum(each[slot.format] for slot in layer.slots)
        stored += sum(each[format] for _, format in {(slot.expert, slot.format) for slot in layer.slots})
    assert manifest.expert_bytes == stored <= manifest.plan.bytes_after


def test_what_was_replaced_is_counted(manifest: Manifest) -> None:
    slots = [slot for layer in manifest.plan.layers for slot in layer.slots]
    experts = sum(layer.geometry.experts for layer in manifest.plan.layers)
    assert manifest.replaced["experts nodes rewritten"] == len(manifest.plan.layers)
    assert manifest.replaced["replicas added"] == len(slots) - experts > 0
    for format in FORMATS:
        assert manifest.replaced.get(f"slots in {format}", 0) == sum(slot.format == format for slot in slots)


def test_what_every_pass_did_is_counted(manifest: Manifest, graph: onnx.GraphProto) -> None:
    ops = Counter(node.op_type for node in graph.node)
    residual = manifest.replaced["residual sums fused with norms"]
    assert manifest.replaced["norms fused"] - residual == ops["SimplifiedLayerNormalization"] > 0
    assert residual == ops["SkipSimplifiedLayerNormalization"] > 0
    assert manifest.replaced["causal masks fused"] == ops["CausalMask"] == 1
    assert manifest.replaced["rotations fused"] - 2 * manifest.replaced["rotated attentions fused"] == ops["RotaryEmbedding"] == 0
    assert manifest.replaced["attentions fused"] == ops["CacheAttention"] > 0
    # A pass that found nothing says so, and why.
    assert manifest.replaced["dense products read as stored"] == ops["DenseGemm"] == 0
    weights = {tensor.name for tensor in graph.initializer}
    products = sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in weights for node in graph.node)
    routers = len(manifest.plan.layers)
    left = {"stored in float32": products - routers, "they choose experts": routers}
    for why, count in left.items():
        assert manifest.replaced[f"dense products not read as stored: {why}"] == count


def test_every_slot_count_can_be_read_from_the_graph(manifest: Manifest, graph: onnx.GraphProto) -> None:
    made = {output for node in graph.node for output in node.output}
    assert manifest.slot_offsets.keys() == {layer.name for layer in manifest.plan.layers}
    assert made.issuperset(manifest.slot_offsets.values())
