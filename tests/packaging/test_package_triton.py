"""The model repository for Triton: the contents of its files and configs."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_stand_in as stand_in
from command_line import refused
from google.protobuf import text_format
from triton_server import Command, as_json, compile_native, read_config, succeed
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from rq_compile.engine.manifest import EngineFile
from rq_compile.files import read_document, sha256, write_document
from rq_compile.planning.schema import Plan
from rq_compile.runtime.engine import Engine
from rq_compile.targets.tensorrt.manifest import Binding, TensorRTManifest
from rq_compile.targets.tensorrt.profiles import Profile


@pytest.fixture(scope="module")
def engines(
    rq_compile: Command, stages: Path, tiny_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two engines: one that needs no op library, and one that does."""
    native = compile_native(rq_compile, stages, tiny_checkpoint("olmoe"), tmp_path_factory.mktemp("native"))
    return {"model": stages / "model.onnx", "native": native}


@pytest.mark.parametrize("name", ["model", "native"])
def test_onnxruntime_config_opens_the_session_of_the_engine(
    rq_compile: Command, engines: dict[str, Path], tmp_path: Path, name: str
) -> None:
    mount = tmp_path / "repository"
    options = ("--flavour", "onnxruntime", "--mount", mount, "--threads", 1, "--instances", 2)
    succeed(rq_compile("package", engines[name], "--for", "triton", *options, "-o", mount, "-q"))
    config = read_config(mount / name)
    assert set(config.parameters) <= stand_in.PARAMETERS
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert (config.name, config.backend, config.instance_group[0].count) == (name, "onnxruntime", 2)

    session = stand_in.open_session(json.loads(as_json(config)), mount / name / "1")
    graph = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    dims = {tensor.name: [*tensor.dims] for tensor in config.input}
    assert {key: [-1 if isinstance(dim, str) else dim for dim in shape[1:]] for key, shape in graph.items()} == dims
    engine = Engine.load(engines[name], threads=1)
    ids = np.random.default_rng(0).integers(0, engine.manifest.vocabulary, (2, 7))
    feeds = {key: value for key, value in engine._feeds(ids, None, None).items() if key in graph}
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], engine.logits(ids)[:, -1:])


def test_op_library_lies_under_the_mount_and_is_named_by_its_content(
    rq_compile: Command, engines: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--flavour", "onnxruntime", "--mount", "/srv/models/", "--name", "moe-1")
    succeed(rq_compile("package", engines["native"], "--for", "triton", *options, "-o", tmp_path / "out", "-q"))
    (path,) = read_config(tmp_path / "out" / "moe-1").model_operations.op_library_filename
    assert Path(path).parent == Path("/srv/models/moe-1/1")
    library = tmp_path / "out" / "moe-1" / "1" / Path(path).name
    assert sha256(library)[:16] in library.name


def test_workload_is_that_of_the_calibration(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    package = ("package", stages / "model.onnx", "--for", "triton", "--flavour", "onnxruntime", "--calibration")
    succeed(rq_compile(*package, stages / "calibration.json", "-o", tmp_path / "out", "-q"))
    calibration = json.loads((stages / "calibration.json").read_text())
    model = tmp_path / "out" / "model"
    config = read_config(model)
    assert config.max_batch_size == calibration["batch_size"]
    prompt, step = config.model_warmup
    assert [*prompt.inputs["input_ids"].dims] == [calibration["sequence_length"]]
    assert [*step.inputs["input_ids"].dims] == [1]
    assert step.inputs["past_key_values.0.key"].dims[1] == calibration["sequence_length"]
    for request in (prompt, step):
        mask = request.inputs["attention_mask"]
        ones = np.frombuffer((model / "warmup" / mask.input_data_file).read_bytes(), np.int64)
        assert ones.tolist() == [1] * mask.dims[0]
        assert mask.dims[0] == request.inputs["input_ids"].dims[0] + request.inputs["past_key_values.0.key"].dims[1]

    other = tmp_path / "calibration.json"
    other.write_text(json.dumps({**calibration, "batch_size": 3}))
    refused(rq_compile(*package, other, "-o", tmp_path / "other"), 2, "not planned with", other)


def test_requests_are_not_batched_where_an_answer_would_depend_on_it(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    package = ("package", "--for", "triton", "--flavour", "onnxruntime", "--json")
    engine = copy_engine(stages, tmp_path)
    alike = succeed(rq_compile(*package, engine, "-o", tmp_path / "alike"))
    assert read_config(tmp_path / "alike" / "model").HasField("dynamic_batching")
    assert "share a batch only" in alike.stdout

    manifest = json.loads((tmp_path / "model.json").read_text())
    slots = manifest["plan"]["layers"][0]["slots"]
    slots.append({**slots[0], "format": "int4" if slots[0]["format"] != "int4" else "int8"})
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    mixed = succeed(rq_compile(*package, engine, "-o", tmp_path / "mixed"))
    assert not read_config(tmp_path / "mixed" / "model").HasField("dynamic_batching")
    assert "not batched" in mixed.stdout


def copy_engine(stages: Path, folder: Path) -> Path:
    manifest = json.loads((stages / "model.json").read_text())
    for name in ("model.json", *(manifest[part]["name"] for part in ("graph", "weights", "tokenizer"))):
        shutil.copy(stages / name, folder)
    return folder / "model.onnx"


# TensorRT: there is no GPU, so the engine here is a file that is never opened.


def tensorrt_engine(folder: Path, plan: Path, content: bytes = b"engine", **changes: Any) -> Path:
    folder.mkdir()
    (folder / "moe.plan").write_bytes(content)
    span = [Profile.parse("batch=1:2:8,sequence=1:16:32,past=0:0:64"), Profile.parse("batch=1:4:4,sequence=1,past=1:16:64")]
    manifest = TensorRTManifest(
        tool="test",
        target="tensorrt",
        precision="bf16",
        compute_capabilities=[],
        files={"engine": EngineFile(name="moe.plan", sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))},
        inputs=[
            Binding(name="input_ids", dtype="int64", shape=["batch", "sequence"]),
            Binding(name="past_key_values.0.key", dtype="bfloat16", shape=["batch", 4, "past", 16]),
        ],
        outputs=[Binding(name="logits", dtype="float32", shape=["batch", "sequence", 128])],
        profiles=span,
        built=None,
        replaced={},
        plan=read_document(Plan, plan),
    )
    write_document(manifest.model_copy(update=changes), folder / "moe.json")
    return folder / "moe.plan"


def test_an_engine_for_each_gpu_and_all_profiles_in_one_group(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    ada = tensorrt_engine(tmp_path / "ada", stages / "plan.json")
    hopper = tensorrt_engine(tmp_path / "hopper", stages / "plan.json", b"another")
    options = ("--engine-for", f"8.9={ada}", "--engine-for", f"9.0={hopper}", "--json")
    result = succeed(rq_compile("package", ada, "--for", "triton", *options, "-o", tmp_path / "out"))
    config = text_format.Parse((tmp_path / "out" / "moe" / "config.pbtxt").read_text(), ModelConfig())
    assert (config.backend, config.max_batch_size, config.default_model_filename) == ("tensorrt", 4, "")
    assert {c: (tmp_path / "out/moe/1" / file).read_bytes() for c, file in config.cc_model_filenames.items()} == {
        "8.9": b"engine",
        "9.0": b"another",
    }
    assert [(group.kind, [*group.profile]) for group in config.instance_group] == [(ModelInstanceGroup.KIND_GPU, ["0", "1"])]
    assert config.HasField("dynamic_batching")
    assert [(i.name, DataType.Name(i.data_type), [*i.dims]) for i in config.input] == [
        ("input_ids", "TYPE_INT64", [-1]),
        ("past_key_values.0.key", "TYPE_BF16", [4, -1, 16]),
    ]
    assert [[*output.dims] for output in config.output] == [[-1, 128]]
    assert "--gpus=all" in json.loads(result.stdout)["run"][1]


def test_a_single_engine_is_for_every_gpu(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    engine = tensorrt_engine(tmp_path / "engine", stages / "plan.json")
    succeed(rq_compile("package", engine, "--for", "triton", "-o", tmp_path / "out"))
    config = text_format.Parse((tmp_path / "out" / "moe" / "config.pbtxt").read_text(), ModelConfig())
    assert not config.cc_model_filenames
    assert (tmp_path / "out" / "moe" / "1" / config.default_model_filename).read_bytes() == b"engine"


def test_an_engine_with_plugins_is_allowed_to_bring_their_code(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    for lowering, allowed in (("plugins", True), ("batched", False)):
        engine = tensorrt_engine(tmp_path / lowering, stages / "plan.json", lowering=lowering)
        result = succeed(rq_compile("package", engine, "--for", "triton", "--json", "-o", tmp_path / f"{lowering}-out"))
        package = json.loads(result.stdout)
        assert package["run"][-1].endswith("--backend-config=tensorrt,version-compatible=true") == allowed
        assert any("contains the code" in remark for remark in package["remarks"]) == allowed


def test_engines_that_cannot_serve_together_are_refused(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    plan = stages / "plan.json"
    engine, rtx = tensorrt_engine(tmp_path / "a", plan), tensorrt_engine(tmp_path / "b", plan, target="tensorrt-rtx")
    other = tensorrt_engine(tmp_path / "c", plan, profiles=[Profile.parse("batch=1,sequence=1,past=1")])
    damaged = tensorrt_engine(tmp_path / "d", plan)
    damaged.write_bytes(b"enginf")
    for source, options, words in (
        (engine, [f"sm89={engine}"], ["--engine-for sm89=", "8.9=moe.plan"]),
        (engine, [f"9.0={other}"], [f"no --engine-for names {engine}"]),
        (engine, [f"8.9={engine}", f"8.9={other}"], ["--engine-for 8.9 is given twice"]),
        (engine, [f"8.9={engine}", f"9.0={other}"], ["tensors or profiles"]),
        (rtx, [], ["TensorRT-RTX", "--builder tensorrt"]),
        (damaged, [], ["is damaged"]),
        (tmp_path / "none.plan", [], ["no engine", "none.plan"]),
    ):
        given = [argument for option in options for argument in ("--engine-for", option)]
        refused(rq_compile("package", source, "--for", "triton", *given, "-o", tmp_path / "out"), 2, *words)
    flavoured = ("package", engine, "--for", "triton", "--flavour", "python", "-o", tmp_path / "out")
    refused(rq_compile(*flavoured), 2, "--flavour python does not support", ".onnx")
    assert not (tmp_path / "out").exists()


# What both write.


@pytest.mark.parametrize("flavour", ["python", "onnxruntime"])
def test_two_runs_give_the_same_bytes_with_right_checksums_and_an_engine_that_verifies(
    rq_compile: Command, engines: dict[str, Path], tmp_path: Path, flavour: str
) -> None:
    for name in ("once", "again"):
        package = ("package", engines["native"], "--for", "triton", "--flavour", flavour, "-o", tmp_path / name, "--json")
        listed = json.loads(succeed(rq_compile(*package)).stdout)["files"]
    once, again = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "once", tmp_path / "again")
    )
    assert once == again
    assert sorted(once) == sorted(listed)
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "once", capture_output=True, text=True, check=True
    )
    assert sorted(checked.stdout.splitlines()) == sorted(f"{name}: OK" for name in once if name != "SHA256SUMS")
    succeed(rq_compile("inspect", tmp_path / "once" / "native" / "1" / "native.onnx", "--verify"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--name", "a/b"], ["'a/b'", "--name"]),
        (["--name", ".."], ["'..'", "--name"]),
        (["--mount", "/models"], ["--mount", "--flavour python"]),
        (["--flavour", "onnxruntime", "--mount", "models"], ["--mount models", "not an absolute path"]),
        (["--flavour", "onnxruntime", "--calibration", "missing.json"], ["missing.json"]),
    ],
)
def test_what_cannot_work_is_refused(
    rq_compile: Command, stages: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    refused(rq_compile("package", stages / "model.onnx", "--for", "triton", *options, "-o", tmp_path / "out"), 2, *words)
    assert not (tmp_path / "out").exists()


def test_flavour_is_for_triton_alone(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    package = ("package", stages / "model.onnx", "--for", "edge", "--flavour", "python", "-o", tmp_path / "out")
    refused(rq_compile(*package), 2, "--flavour", "--for edge")


def test_a_missing_tritonclient_is_named(
    rq_compile: Command, stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    refused(rq_compile("package", stages / "model.onnx", "--for", "triton", "-o", tmp_path / "out"), 2, "pip install")


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "SHA256SUMS"])
def test_a_model_called_as_a_file_of_the_package(rq_compile: Command, stages: Path, tmp_path: Path, name: str) -> None:
    result = rq_compile("package", stages / "model.onnx", "--for", "triton", "--name", name, "-o", tmp_path / "triton")
    refused(result, 2, name, "give another --name")
    assert not (tmp_path / "triton").exists()
