"""The network for TensorRT: 16 bits where that suffices, and the same results in ONNX Runtime."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from layer_in_half import EXPERTS, GEOMETRY, layer_in_half
from one_layer import LAYER, MIXED, batch, one_layer, plan_of, reference
from onnx import TensorProto, helper
from rows import all_rows
from safetensors.torch import load_file, save_file

from rq_compile.architectures.model import Model
from rq_compile.errors import UserError
from rq_compile.export.exported import Exported
from rq_compile.files import read_document
from rq_compile.lowerings import TensorRTLanes
from rq_compile.planning.schema import Plan
from rq_compile.rewrite.batched_experts import ExpectedCapacity
from rq_compile.rewrite.contract import ContractError
from rq_compile.rewrite.halves import HALVES
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rewrite import imported
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section
from rq_compile.runtime.reference import Reference
from rq_compile.targets.tensorrt.half_precision import half_precision, router_nodes
from rq_compile.targets.tensorrt.narrow import Version, in_versions, narrowed
from rq_compile.targets.tensorrt.network import Network, default_precision, expected_capacity, remark_on_precision, write_network
from rq_compile.targets.tensorrt.profiles import MOST_SCORES, Profile, Range, default_profiles

PROFILES = default_profiles(2, 16, 64)
LANES = TensorRTLanes(expected_capacity(PROFILES))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    folder = tmp_path_factory.mktemp("layer")
    layer_in_half(folder)
    return session(folder / "layer.onnx")


@pytest.mark.parametrize(("tokens", "only"), [(1, None), (7, 0), (40, None), (40, 3)])
def test_a_layer_in_fp16_gives_its_answers_in_onnx_runtime(
    layer: onnxruntime.InferenceSession, tokens: int, only: int | None
) -> None:
    x, ids, gates = batch(GEOMETRY, tokens, only=only)
    x, gates = x.astype(np.float16), gates.astype(np.float16)
    (y,) = layer.run(["y"], {"x": x, "ids": ids, "gates": gates})
    wanted = reference(x, ids, gates, GEOMETRY, MIXED, EXPERTS)
    # 8 and 4 bits are rounded by column and with 16-bit scales; the formats' step sizes bound the effect.
    np.testing.assert_allclose(y, wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "slots", [[(0, "int8"), (3, "int4"), (1, "constant"), (2, "constant")], [(e, "constant") for e in range(4)]]
)
def test_mean_outputs_take_the_place_of_experts_in_fp16(slots: list[tuple[int, str]], tmp_path: Path) -> None:
    layer_in_half(tmp_path, slots=slots)
    onnx.checker.check_model(str(tmp_path / "layer.onnx"), full_check=True)
    for tokens, only in ((1, None), (1, 2), (40, None), (40, 2)):
        x, ids, gates = batch(GEOMETRY, tokens, only=only)
        x, gates = x.astype(np.float16), gates.astype(np.float16)
        (y,) = session(tmp_path / "layer.onnx").run(["y"], {"x": x, "ids": ids, "gates": gates})
        wanted = reference(x, ids, gates, GEOMETRY, slots, EXPERTS)
        np.testing.assert_allclose(y, wanted, atol=0.02 * np.abs(wanted).max())


def test_types_are_written_out_and_experts_are_in_half(tmp_path: Path) -> None:
    model = layer_in_half(tmp_path)
    onnx.checker.check_model(str(tmp_path / "layer.onnx"), full_check=True)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    inner = [a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    assert len(inner) == 1
    assert not any(tensor.data_type == TensorProto.FLOAT for graph in inner for tensor in graph.initializer)
    scales = [node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert {types[name] for name in scales} == {TensorProto.FLOAT16}
    assert [node.op_type for graph in inner for node in graph.node].count("MatMul") == 6


def test_bf16_is_well_typed_too(tmp_path: Path) -> None:
    layer_in_half(tmp_path, "bf16")
    onnx.checker.check_model(str(tmp_path / "layer.onnx"), full_check=True)


def test_int4_weights_are_kept_apart_in_loops(tmp_path: Path) -> None:
    model = layer_in_half(tmp_path)
    int4 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4}
    direct = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in int4}
    (body,) = (a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    assert len(direct) == 2
    names = {tensor.name for tensor in model.graph.initializer}
    assert names.isdisjoint(tensor.name for tensor in body.initializer), "the loop reads the weights of the main graph"
    assert not any(node.op_type == "MatMul" and node.input[1] in direct for node in body.node)
    assert any(node.op_type == "MatMul" and node.input[1] in direct for node in model.graph.node)


@pytest.fixture(scope="module")
def network(
    tiny_checkpoint: Callable[[str], Path],
    stages: Path,
    export_once: Callable[[Model], Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Network, Exported]:
    """The tiny OLMoE with the replicas of its plan, but nothing quantized, so that it differs from the original only by fp16."""
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    checkpoint, plan = Model.open(tiny_checkpoint("olmoe")), read_document(Plan, stages / "plan.json")
    exported = export_once(checkpoint)
    layers = [
        layer.model_copy(update={"slots": [slot.model_copy(update={"format": "fp32"}) for slot in layer.slots]})
        for layer in plan.layers
    ]
    plan = plan.model_copy(update={"layers": layers})
    return path, write_network(checkpoint, plan, exported, LANES, path), exported


def test_a_model_gives_the_logits_of_transformers(network: tuple[Path, Network, Exported], model: Path) -> None:
    path, _, exported = network
    ids = np.random.default_rng(0).integers(4, 99, (3, 40))
    running = session(all_rows(path))
    past = {tensor.past: tensor.empty(3).astype(np.float16) for tensor in exported.cache}
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(40), (3, 1))}
    logits, *present = running.run(None, feeds | past)
    wanted = Reference.load(Model.open(model)).logits(ids)
    assert logits.dtype == np.float32
    assert {array.dtype for array in present} == {np.dtype(np.float16)}
    # A token whose experts' scores differ only by rounding may go to a different expert.
    assert np.quantile(np.abs(logits - wanted).max(-1), 0.95) < 0.01 * np.abs(wanted).max()
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() > 0.97
    # In two steps, with the cache of the first.
    first = running.run(None, {name: value[:, :30] for name, value in feeds.items()} | past)
    cache = dict(zip(past, first[1:], strict=True))
    rest = {name: value[:, 30:] for name, value in feeds.items()} | {"attention_mask": feeds["attention_mask"]}
    np.testing.assert_allclose(running.run(["logits"], rest | cache)[0], logits[:, 30:], atol=0.02)


def widened(path: Path) -> Path:
    """A bf16 network with bf16 replaced by fp32, which has the same range: ONNX Runtime does not support bf16 on the CPU."""
    model = onnx.load(path)
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.BFLOAT16:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.t.data_type == TensorProto.BFLOAT16:
                wide = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide))
    onnx.save(model, path.with_suffix(".fp32.onnx"))
    return path.with_suffix(".fp32.onnx")


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def spread(family: str, folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint whose hidden states exceed fp16's range, although its weights do not."""
    tiny.build(family, folder, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor * 2**16 if name.endswith("o_proj.weight") else tensor for name, tensor in tensors.items()}
    assert max(tensor.abs().max() for tensor in changed.values()) < 65504
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_a_bf16_checkpoint_keeps_its_range(family: str, tmp_path: Path, stages: Path, rq_compile: Callable) -> None:
    folder = spread(family, tmp_path / "m", torch.bfloat16)
    text = ("--text", stages / "text.txt", "--sequence-length", 64)
    calibrated = rq_compile("calibrate", folder, *text, "-o", tmp_path / "c.json")
    assert calibrated.exit_code == 0, calibrated.stderr
    assert rq_compile("plan", tmp_path / "c.json", "--policy", "none", "-o", tmp_path / "p.json").exit_code == 0
    reference = Reference.load(Model.open(folder))
    wanted = reference.logits(ids := np.random.default_rng(0).integers(4, 99, (2, 20)))
    states = reference.model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    assert max(state.abs().max() for state in states[:-1]) > 65504
    given = (folder, "--plan", tmp_path / "p.json", "--no-build", "--profile", "batch=1:2:2,sequence=1:20:20,past=0:0:1", "-o")
    result = rq_compile(*given, tmp_path / "m.plan")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "m.json").read_text())["precision"] == "bf16"
    running = session(widened(all_rows(tmp_path / "m.network.onnx")))
    past = {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        for value in running.get_inputs()
        if value.name.startswith("past")
    }
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(20), (2, 1))}
    (logits,) = running.run(["logits"], feeds | past)
    assert np.quantile(np.abs(logits - wanted).max(-1), 0.9) < 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp16")])
def test_the_precision_is_the_checkpoints(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    model = Model.open(tiny.build("olmoe", tmp_path / "m", dtype=dtype))
    assert default_precision(model) == precision
    assert (remark_on_precision(model, "fp16") is None) == (dtype == torch.float16)
    assert remark_on_precision(model, "bf16") is None


def test_one_bf16_tensor_asks_for_bf16(tmp_path: Path) -> None:
    folder = tiny.build("olmoe", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert default_precision(Model.open(folder)) == "bf16"


def test_the_logits_are_those_of_the_last_token(network: tuple[Path, Network, Exported]) -> None:
    path, written, exported = network
    model = written.model
    (logits,) = (value for value in model.graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1
    assert "logits_to_keep" not in {value.name for value in model.graph.input}
    ids = np.random.default_rng(0).integers(4, 99, (2, 9))
    past = {tensor.past: tensor.empty(2).astype(np.float16) for tensor in exported.cache}
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(9), (2, 1)), **past}
    (last,), (every,) = (session(file).run(["logits"], feeds) for file in (path, all_rows(path)))
    np.testing.assert_array_equal(last, every[:, -1:])


def test_padding_changes_nothing(network: tuple[Path, Network, Exported]) -> None:
    path, _, exported = network
    ids = np.random.default_rng(1).integers(4, 99, (2, 12))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    past = {tensor.past: tensor.empty(2).astype(np.float16) for tensor in exported.cache}
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    path = all_rows(path)
    padded = session(path).run(["logits"], {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})[0]
    alone = {name: value[:1] for name, value in past.items()}
    feeds = {"input_ids": ids[:1, 5:], "attention_mask": mask[:1, 5:], "position_ids": positions[:1, 5:], **alone}
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[0, 5:], session(path).run(["logits"], feeds)[0][0], atol=0.02)


def test_routers_norms_and_logits_stay_in_fp32(network: tuple[Path, Network, Exported]) -> None:
    _, written, exported = network
    model = written.model
    typed = onnx.shape_inference.infer_shapes(model)
    known = {v.name: v.type.tensor_type.elem_type for v in (*typed.graph.value_info, *typed.graph.input, *typed.graph.output)}
    router = router_nodes(imported(exported.model))
    of_router = [node for node in model.graph.node if node.name in router]
    assert {"TopK", "Softmax"} < {node.op_type for node in of_router}
    norms = [node for node in model.graph.node if node.op_type in ("ReduceMean", "Sqrt", "Cos")]
    for node in (*of_router, *norms):
        assert TensorProto.FLOAT16 not in [known.get(name) for name in (*node.input, *node.output)]
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.name not in router]
    assert {known[node.output[0]] for node in products} == {TensorProto.FLOAT16}


def test_every_node_is_counted(tmp_path: Path) -> None:
    """Also those inside of loops; each that stays in fp32 has a reason."""
    lanes = TensorRTLanes(ExpectedCapacity(headroom=0.3, least=2))
    lowered = lanes.lower(one_layer(32, 2), plan_of(GEOMETRY, MIXED), lambda _, e: EXPERTS[e])
    model, _, report = half_precision(lowered.model, HALVES["fp16"], layers=[LAYER])
    typed = onnx.shape_inference.infer_shapes(model)
    elements: dict[int, int] = dict.fromkeys((TensorProto.FLOAT, TensorProto.FLOAT16), 0)
    for graph in graphs(typed.graph):
        known = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
        for node in graph.node:
            casts_of_ours = node.op_type == "Cast" and node.name.endswith((".fp16.cast", ".fp32.cast", "y.cast"))
            if not casts_of_ours and known.get(node.output[0]) in elements:
                elements[known[node.output[0]]] += 1
    assert report.changed == elements[TensorProto.FLOAT16]
    assert report.left == {"they sum over experts": elements[TensorProto.FLOAT]}
    assert report.matches == sum(elements.values())
    assert counts_of(lowered.reports)["int4 products in loops kept apart"] == 2


def test_a_network_says_what_every_pass_did(network: tuple[Path, Network, Exported]) -> None:
    counts = network[1].replaced
    assert counts["logits_to_keep inputs fixed"] == 1
    assert counts["int4 products in loops kept apart"] == 0
    assert counts["nodes in 16 bit"] > counts["nodes not in 16 bit: they choose experts"] > 0


def test_a_graph_of_other_floats_is_refused() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    nodes = [helper.make_node("Relu", ["x"], ["z"], "same"), helper.make_node("Relu", ["z"], ["y"], "same")]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [out]), opset_imports=[helper.make_opsetid("", 21)])
    with pytest.raises(ContractError, match="half_precision requires nodes with names"):
        half_precision(model, HALVES["fp16"])


def section(values: np.ndarray) -> Section:
    weight = ExternalWeight("w", values.dtype, values.shape)
    return Section("w", (weight,), (Piece((weight,), lambda: (values,), values.nbytes),))


def test_no_scale_is_zero() -> None:
    made = in_versions(section(np.array([0, -0.0, 1e-12, 0.5], np.float32)), {"w": [Version("w.fp16", HALVES["fp16"], True)]})
    ((scales,),) = (piece.values() for piece in made.pieces)
    assert made.weights[0].name == "w.fp16"
    assert scales.dtype == np.float16
    assert (scales > 0).all()
    assert scales[3] == 0.5


def test_a_weight_in_two_versions_and_one_beyond_fp16() -> None:
    values = np.array([1.5, 70000], np.float32)
    both = [Version("w", np.dtype(np.float32)), Version("w.bf16", np.dtype(ml_dtypes.bfloat16))]
    as_it_was, narrow = in_versions(section(values), {"w": both}).pieces[0].values()
    assert np.array_equal(as_it_was, values)
    assert narrow.astype(np.float32).tolist() == [1.5, 70144]
    with pytest.raises(UserError, match=r"w.fp16 has the value 7e\+04, which float16 cannot hold; for .plan use"):
        in_versions(section(values), {"w": [Version("w.fp16", np.dtype(np.float16))]}).pieces[0].values()


def test_a_masks_infinity_can_be_added_to() -> None:
    lowest = np.finfo(np.float32).min
    made = narrowed(np.array([0, lowest, -np.inf, 3], np.float32), HALVES["fp16"])
    assert np.isfinite(made + np.float16(-3000)).all()
    assert made.tolist() == [0, -32752, -32752, 3]


def test_profiles_as_text() -> None:
    profile = Profile.parse("batch=1:8:32,sequence=1,past=1:256:2047")
    assert profile.sequence == Range(least=1, best=1, most=1)
    assert profile.batch == Range(least=1, best=8, most=32)
    rest = ",sequence=1,past=0"
    for wrong in (f"batch=8:1:32{rest}", "batch=1", f"batch=a{rest}", "sequence", f"batch=0:1:2{rest}", f"batch=1,batch=2{rest}"):
        with pytest.raises(UserError, match=f"--profile {wrong} is not a profile"):
            Profile.parse(wrong)


def test_default_profiles_and_capacity() -> None:
    prompts, decoding = default_profiles(8, 256, 2048)
    assert (prompts.sequence.most, prompts.past.most, decoding.past.best, decoding.most_tokens) == (1024, 2047, 256, 32)
    assert expected_capacity([prompts, decoding]) == ExpectedCapacity(least=32, most=32768)
    assert expected_capacity([decoding]) == ExpectedCapacity(least=32, most=32)
    for texts, sequence, context, heads in [
        (8, 256, 40960, 32), (8, 256, 131072, 64), (1, 4096, 40960, 128), (64, 2048, 10**7, 16), (8, 256, 40960, 4),
    ]:  # fmt: skip
        for profile in default_profiles(texts, sequence, context, heads):
            assert profile.most_scores(heads) <= 1.01 * MOST_SCORES
            assert profile.batch.best <= profile.batch.most
            assert Profile.parse(str(profile)) == profile
    prompts, decoding = default_profiles(8, 256, 40960, 32)
    assert (prompts.batch.most, prompts.sequence.most, prompts.past.most, decoding.past.most) == (32, 1024, 1024, 40959)
    small, _ = default_profiles(2, 256, 64)
    assert small.sequence.best <= small.sequence.most <= 64
