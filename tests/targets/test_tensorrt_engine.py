"""``-o engine.plan``: actually built with TensorRT-RTX, which needs no GPU to build; for TensorRT, everything but the build."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import onnxruntime
import pytest
from command_line import names, refused
from layer_in_half import GEOMETRY, layer_in_half
from one_layer import MIXED, plan_of
from onnx import AttributeProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from rq_compile.architectures.model import Model
from rq_compile.cli.compile import command as compile_command
from rq_compile.errors import UserError
from rq_compile.export.exported import Exported
from rq_compile.files import read_document
from rq_compile.schemas import schema
from rq_compile.targets.tensorrt import build_engine
from rq_compile.targets.tensorrt import compile as target
from rq_compile.targets.tensorrt.ep_context import ep_context
from rq_compile.targets.tensorrt.manifest import TensorRTManifest
from rq_compile.targets.tensorrt.profiles import default_profiles
from rq_compile.targets.tensorrt.trtexec import trtexec

rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
DECODING = "batch=1:2:4,sequence=1,past=1:16:60"


@pytest.fixture(scope="module", autouse=True)
def exported_once(export_once: Callable[[Model], Exported]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "export_graph", export_once)
        yield


@pytest.fixture(scope="module")
def unbuilt(rq_compile: Callable, model: Path, stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbuilt")
    arguments = (model, "--plan", stages / "plan.json", "-o", folder / "m.plan", "--no-build", "--profile", DECODING)
    result = rq_compile(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "python m.build.py m.build.json, or sh m.build.sh" in result.stderr
    return folder


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("olmoe")


@rtx
def test_an_engine_is_built_without_a_gpu(rq_compile: Callable, model: Path, stages: Path, unbuilt: Path, out: Path) -> None:
    arguments = (
        model,
        "--plan",
        stages / "plan.json",
        "-o",
        out / "m.plan",
        "--builder",
        "rtx",
        "--sm",
        "89",
        "--profile",
        DECODING,
    )
    result = rq_compile(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert names(out) == ["m.context.onnx", "m.json", "m.plan", "m.tokenizer.json"]
    manifest = read_document(TensorRTManifest, out / "m.json")
    assert json.loads(result.stdout) == json.loads(manifest.model_dump_json())
    built = manifest.built
    assert built is not None
    assert built.builder.startswith("tensorrt_rtx ")
    assert built.bytes == (out / "m.plan").stat().st_size > built.weight_bytes
    assert built.compute_capabilities == [89]
    assert built.network_layers["DEQUANTIZE"] > 0
    assert "TRIP_LIMIT" not in built.network_layers  # decoding needs no further pass
    assert sum(built.engine_layers.values()) > 0
    # There is no 16-bit copy of the experts: the engine contains the weights of the network.
    assert built.weight_bytes < 1.2 * (unbuilt / "m.network.onnx.data").stat().st_size

    shown = rq_compile("inspect", out / "m.plan")
    assert shown.exit_code == 0, shown.stderr
    for word in (
        "8.9",
        "past_key_values.0.key",
        "float16",
        "1 : 2 : 4",
        f"{built.bytes / 1e6:.2f} MB",
        "DEQUANTIZE",
        "tensorrt_rtx",
    ):
        assert word in shown.stdout


def test_without_a_build_everything_else_is_written(unbuilt: Path) -> None:
    files = "build.json build.py build.sh context.onnx json network.onnx network.onnx.data tokenizer.json"
    assert names(unbuilt) == [f"m.{name}" for name in files.split()]
    manifest = read_document(TensorRTManifest, unbuilt / "m.json")
    jsonschema.validate(json.loads((unbuilt / "m.json").read_text()), json.loads(schema("tensorrt-engine")))
    assert manifest.built is None
    assert (manifest.target, manifest.precision) == ("tensorrt", "fp16")
    assert {file.name for file in manifest.files.values()} == set(names(unbuilt)) - {"m.json"}
    for file in manifest.files.values():
        assert (unbuilt / file.name).stat().st_size == file.bytes
    cache = [binding for binding in manifest.inputs if binding.name.startswith("past")]
    assert {binding.dtype for binding in cache} == {"float16"}
    assert cache[0].shape == ["batch", 2, "past", 8]


@rtx
def test_the_script_builds_on_a_machine_without_rq_compile(unbuilt: Path, tmp_path: Path, rq_compile: Callable) -> None:
    for name in names(unbuilt):
        (tmp_path / name).write_bytes((unbuilt / name).read_bytes())
    command = [sys.executable, "-I", "m.build.py", "m.build.json", "--builder", "rtx", "--sm", "80"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.plan").stat().st_size > 100_000
    shown = rq_compile("inspect", tmp_path / "m.plan", "--json")
    assert json.loads(shown.stdout)["built"]["compute_capabilities"] == [80]


def test_the_trtexec_line_has_every_shape_of_every_profile(unbuilt: Path) -> None:
    settings = json.loads((unbuilt / "m.build.json").read_text())
    line = (unbuilt / "m.build.sh").read_text()
    assert line == trtexec("m.network.onnx", "m.plan", "m.timing", settings["profiles"])
    assert "--profile=0" in line
    assert "--noTF32" in line
    wanted = {"minShapes": "1x2", "optShapes": "2x17", "maxShapes": "4x61"}
    for option, shape in wanted.items():
        assert re.search(rf"--{option}=\S*attention_mask:{shape}\b", line)
    assert subprocess.run(["sh", "-n"], input=line, text=True, check=False).returncode == 0


def test_onnx_runtime_knows_the_context_model(unbuilt: Path) -> None:
    path = unbuilt / "m.context.onnx"
    made = onnx.load(path)
    network = onnx.load(unbuilt / "m.network.onnx", load_external_data=False)
    (node,) = made.graph.node
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert (node.domain, node.op_type) == ("com.microsoft", "EPContext")
    assert attributes["embed_mode"] == 0
    assert attributes["ep_cache_context"] == b"m.plan"
    assert attributes["source"] == b"TensorrtExecutionProvider"
    assert list(made.graph.input) == list(network.graph.input)
    assert list(made.graph.output) == list(network.graph.output)
    (schema,) = (found for found in get_all_operator_schema() if found.name == "EPContext")
    kinds = {"INT": AttributeProto.INT, "STRING": AttributeProto.STRING}
    for attribute in node.attribute:
        assert kinds[schema.attributes[attribute.name].type.name] == attribute.type
    # Its graph and schema are accepted; on the CPU, only the provider that runs it is missing.
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*EPContext"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_context_model_names_its_provider_and_its_gpu(unbuilt: Path) -> None:
    network = onnx.load(unbuilt / "m.network.onnx", load_external_data=False)
    for capabilities, wanted in (([89], b"89"), ([80, 89], None)):
        (node,) = ep_context(network, "m.plan", "tensorrt-rtx", capabilities, "1.7").graph.node
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes.get("hardware_architecture") == wanted
        assert attributes["source"] == b"NvTensorRTRTXExecutionProvider"
        assert attributes["ep_sdk_version"] == b"1.7"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--builder", "rtx"], ["--sm 80,89,120"]),
        (["--sm", "89", "--no-build"], ["--builder tensorrt", "leave --sm out"]),
        (["--builder", "rtx", "--sm", "a", "--no-build"], ["--sm a is not a list"]),
        (["--builder", "rtx", "--sm", "8\N{SUPERSCRIPT TWO}", "--no-build"], ["is not a list"]),
        (["--profile", "batch=1", "--no-build"], ["--profile batch=1 is not a profile"]),
        (["--lowering", "stock"], ["--lowering has no effect on", ".onnx"]),
    ],
)
def test_what_a_builder_would_refuse_is_refused_at_once(
    options: list[str], words: list[str], rq_compile: Callable, model: Path, stages: Path, out: Path
) -> None:
    refused(rq_compile(model, "--plan", stages / "plan.json", "-o", out / "m.plan", *options), 2, *words)
    # Without a plan, it fails before the model is calibrated: otherwise there would be progress on stderr.
    refused(rq_compile(model, "--text", stages / "text.txt", "-o", out / "m.plan", *options), 2, *words)
    assert names(out) == []


@rtx
def test_a_gpu_that_the_builder_does_not_know(rq_compile: Callable, model: Path, stages: Path, out: Path) -> None:
    result = rq_compile(model, "--plan", stages / "plan.json", "-o", out / "m.plan", "--builder", "rtx", "--sm", "90")
    refused(result, 2, "--sm 90", "80, 86, 89, 120, 121")


def test_a_missing_builder_is_named_with_its_command(
    rq_compile: Callable, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = rq_compile(model, "--plan", stages / "plan.json", "-o", out / "m.plan")
    refused(result, 2, "package tensorrt", "pip install 'tensorrt>=10.13'", "--builder rtx", "--no-build")


def test_options_for_plans_have_no_effect_on_onnx(rq_compile: Callable, model: Path, stages: Path, out: Path) -> None:
    refused(
        rq_compile(model, "--plan", stages / "plan.json", "-o", out / "m.onnx", "--sm", "89"), 2, "--sm has no effect", ".plan"
    )


def test_verify_finds_a_damaged_file(unbuilt: Path, tmp_path: Path, rq_compile: Callable) -> None:
    for name in names(unbuilt):
        (tmp_path / name).write_bytes((unbuilt / name).read_bytes())
    assert rq_compile("inspect", tmp_path / "m.plan", "--verify").exit_code == 0
    data = bytearray((tmp_path / "m.network.onnx.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m.network.onnx.data").write_bytes(data)
    refused(rq_compile("inspect", tmp_path / "m.plan", "--verify"), 1, "m.network.onnx.data is damaged")


def test_a_plan_without_its_manifest(rq_compile: Callable, tmp_path: Path) -> None:
    (tmp_path / "m.plan").write_bytes(b"engine")
    refused(rq_compile("inspect", tmp_path / "m.plan"), 2, "m.plan has no manifest m.json")


@rtx
def test_every_format_is_built_with_further_passes(tmp_path: Path) -> None:
    layer_in_half(tmp_path)
    (tmp_path / "layer.onnx").replace(tmp_path / "n.onnx")
    shapes = {name: [[1, n], [8, n], [64, n]] for name, n in (("x", 32), ("ids", 2), ("gates", 2))}
    settings = {"network": "n.onnx", "engine": "n.plan", "builder": "rtx", "compute_capabilities": [120], "profiles": [shapes]}
    (tmp_path / "n.json").write_text(json.dumps(settings))
    command = [sys.executable, build_engine.__file__, str(tmp_path / "n.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "n.plan.report.json").read_text())
    assert report["network_layers"]["DEQUANTIZE"] == 4
    assert report["network_layers"]["TRIP_LIMIT"] > 0


def test_bf16_needs_a_gpu_that_has_it(model: Path) -> None:
    settings = target.Settings("rtx", (), [75, 89], precision="bf16", build=False)
    with pytest.raises(
        UserError, match=r"the network is bf16, which --sm 75 lacks; .* --precision fp16, whose largest number is 65504"
    ):
        target.check_settings(settings, Model.open(model))
    target.check_settings(replace(settings, capabilities=[89]), Model.open(model))


def test_int4_needs_a_gpu_that_has_it() -> None:
    plan = plan_of(GEOMETRY, MIXED)
    (layer,) = plan.layers
    with pytest.raises(UserError, match="layer 0 has experts in int4, which --sm 75 lacks"):
        target.check_layer(layer, target.Settings("rtx", default_profiles(2, 16, 64), [75], build=False))
    target.check_layer(layer, target.Settings("rtx", default_profiles(2, 16, 64), [80], build=False))


@rtx
def test_a_network_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    node = helper.make_node("Mystery", ["x"], ["y"], "node", domain="rq.moe")
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "n.onnx")
    settings = {
        "network": "n.onnx",
        "engine": "n.plan",
        "builder": "rtx",
        "compute_capabilities": [89],
        "profiles": [{"x": [[1], [1], [1]]}],
    }
    (tmp_path / "n.json").write_text(json.dumps(settings))
    command = [sys.executable, build_engine.__file__, str(tmp_path / "n.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"^error: tensorrt_rtx .* cannot read n.onnx, at Mystery node: ", done.stderr, re.MULTILINE)
    assert names(tmp_path) == ["n.json", "n.onnx"]


def test_default_profiles_are_shapes_of_every_input(unbuilt: Path) -> None:
    network = onnx.load(unbuilt / "m.network.onnx", load_external_data=False)
    for profile in default_profiles(8, 64, 256):
        shapes = profile.shapes(network)
        assert shapes.keys() == {value.name for value in network.graph.input}
        for least, best, most in shapes.values():
            assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))
        assert shapes["attention_mask"][2][1] == profile.past.most + profile.sequence.most


def test_the_options_repeat_the_builders_names() -> None:
    option: Any
    (option,) = (parameter for parameter in compile_command.params if parameter.name == "builder")
    assert set(option.type.choices) == set(build_engine.BUILDERS)
