"""The model repository for Triton: what its files and configs say."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import triton_stand_in as stand_in
from command_line import refused
from google.protobuf import text_format
from triton_server import Command, as_json, compile_native, read_config, succeed
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from rq_compile.errors import UserError
from rq_compile.files import sha256
from rq_compile.packaging import triton_tensorrt
from rq_compile.packaging.triton_config import Tensor, as_text
from rq_compile.runtime.engine import Engine


@pytest.fixture(scope="module")
def engines(rq_compile: Command, stages: Path, tiny_checkpoint: Callable, tmp_path_factory) -> dict[str, Path]:
    """One engine that needs no op library, one that does."""
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
    ids = np.random.default_rng().integers(0, engine.manifest.vocabulary, (2, 7))
    feeds = {key: value for key, value in engine._feeds(ids, None, None).items() if key in graph}
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], engine.logits(ids))


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


# TensorRT: the config alone, no command packages a plan yet.


def test_tensorrt_config_has_a_plan_for_each_gpu_and_profiles_for_each_group() -> None:
    ids = Tensor("input_ids", np.dtype(np.int64), (-1,))
    logits = Tensor("logits", np.dtype(np.float16), (-1, 128))
    plans = {"8.9": "sm89.plan", "9.0": "sm90.plan"}
    text = as_text(triton_tensorrt.config("moe", plans, [ids], [logits], max_batch_size=8, profiles=[[0], [1, 2]]))
    config = text_format.Parse(text, ModelConfig())
    assert (config.backend, config.max_batch_size, config.default_model_filename) == ("tensorrt", 8, "")
    assert dict(config.cc_model_filenames) == plans
    assert [[*group.profile] for group in config.instance_group] == [["0"], ["1", "2"]]
    assert {group.kind for group in config.instance_group} == {ModelInstanceGroup.KIND_GPU}
    assert config.HasField("dynamic_batching")
    assert (config.output[0].data_type, [*config.output[0].dims]) == (DataType.Value("TYPE_FP16"), [-1, 128])


@pytest.mark.parametrize(("plans", "word"), [({}, "needs a plan"), ({"sm89": "a.plan"}, "sm89"), ({"89": "a.plan"}, "8.9")])
def test_plans_without_a_compute_capability_are_refused(plans: dict[str, str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        triton_tensorrt.config("moe", plans, [], [])


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
        (["--flavour", "onnxruntime", "--mount", "models"], ["--mount models", "not absolute"]),
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
