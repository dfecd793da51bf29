"""librq_tensorrt.so without TensorRT's builder and without a GPU."""

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_nodes
import onnx
import op_nodes
import plugin_builds
import pytest
from moe_nodes import ACTIVATIONS, INT4_ALONE, compiled_layer, geometry_of
from one_layer import FEW_BITS, MIXED, PLAIN, plan_of
from onnx import TensorProto, helper
from plugin_builds import ROOT, SANITIZED, SANITIZERS, checked, compiled, shared_library, stand_in_driver

LAUNCHER = ROOT / "plugins" / "launcher"


Headers = tuple[Path, Path]
Host = Callable[..., str]


@pytest.fixture(scope="module")
def headers() -> Headers:
    """The folders of TensorRT's and of CUDA's headers."""
    package = importlib.util.find_spec("kernel_lens")
    if package is None or not package.submodule_search_locations:
        pytest.skip("no TensorRT headers: pip install kernel-lens")
    places = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    cuda = [place for place in [*places, *Path("/usr/local").glob("cuda*/include")] if (place / "cuda.h").exists()]
    if not cuda:
        pytest.skip("no CUDA headers: install a toolkit or set CUDA_HOME")
    return Path(package.submodule_search_locations[0]) / "include" / "tensorrt", cuda[0]


def library(folder: Path, headers: Headers, kernels: Path, *options: str) -> Path:
    where = [f"-DTENSORRT_INCLUDE_DIR={headers[0]}", f"-DCUDA_INCLUDE_DIR={headers[1]}"]
    return plugin_builds.library("tensorrt", "librq_tensorrt.so", folder, kernels, *where, *options)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory, headers: Headers, built_kernels: Path) -> Path:
    return library(tmp_path_factory.mktemp("plugin"), headers, built_kernels)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, headers: Headers, described_kernels: Path) -> Host:
    """Runs the host program with a library, both built with sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    checking = library(folder, headers, described_kernels, *SANITIZED)
    program = compiled("tensorrt_host.cc", folder / "host", headers, "-g", f"-fsanitize={SANITIZERS}")
    environment = os.environ | {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    return lambda *arguments: checked(program, checking, *arguments, env=environment)


def test_everything_up_to_enqueue_right_and_wrong(host: Host) -> None:
    assert "0 failures" in host()


def test_random_fields_and_shapes_break_nothing(host: Host) -> None:
    seed = secrets.randbits(31)
    made = re.search(r"(\d+) made, (\d+) configured", host(seed, 4000))
    assert made, f"seed {seed}"


# nvinfer1::DataType
TYPES = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 1, TensorProto.INT8: 2, TensorProto.INT32: 3, TensorProto.INT64: 8}
TYPES[TensorProto.BFLOAT16] = 7


def description(model: onnx.ModelProto) -> str:
    """A line for tensorrt_host.cc about the model's only MoeLayer, with fields and inputs as TensorRT's parser makes them."""
    (node,) = moe_nodes.moe_nodes(model)
    attributes = moe_nodes.attributes_of(node)
    words = []
    for name, value in attributes.items():
        if isinstance(value, list):
            words += [name, len(value), *value]
        elif not name.startswith("plugin_"):
            words += [name, value.decode() if isinstance(value, bytes) else value]
    known = {value.name: value.type.tensor_type for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    known |= {value.name: value.type.tensor_type for value in model.graph.input}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in node.input:
        if name in held:
            words += ["input", TYPES[held[name].data_type], len(held[name].dims), *held[name].dims]
        else:
            words += ["input", TYPES[known[name].elem_type], 2, -1, known[name].shape.dim[1].dim_value]
    return " ".join(map(str, words))


def test_every_node_that_the_compiler_writes_is_taken(host: Host, tmp_path: Path) -> None:
    """Layers with every activation, in both 16-bit types, with single and mixed formats, with biases and loads."""
    lines = []
    for activation in ACTIVATIONS:
        for half in ("fp16", "bf16"):
            for slots in (PLAIN, INT4_ALONE, MIXED, FEW_BITS):
                geometry = geometry_of(activation, bias=slots is MIXED)
                plan = plan_of(geometry, slots)
                if slots is MIXED:
                    (layer,) = plan.layers
                    loaded = [slot.model_copy(update={"load": 1 / len(slots)}) for slot in layer.slots]
                    plan = plan.model_copy(update={"layers": [layer.model_copy(update={"slots": loaded})]})
                lines.append(description(compiled_layer(geometry, slots, tmp_path, half=half, plan=plan)[0]))
    (tmp_path / "nodes").write_text("\n".join(lines) + "\n")
    assert host(tmp_path / "nodes").splitlines() == ["taken"] * len(lines)


def test_a_damaged_node_is_refused(host: Host, tmp_path: Path) -> None:
    line = description(compiled_layer(geometry_of(), MIXED, tmp_path)[0])
    damaged = {
        "field formats has 7": line.replace("formats 8 1", "formats 8 7"),
        "field activation has an activation that is unknown": line.replace("swiglu", "swish"),
        "these formats need 17 inputs": line.rsplit(" input", 1)[0],
        "up_int8_packed has a wrong type": line.replace("input 2 3 2 128 128", "input 0 3 2 128 128", 1),
        "up_int8_scales is [2, 127, 1] where [2, 128, ?]": line.replace("input 0 3 2 128 1 ", "input 0 3 2 127 1 ", 1),
    }
    (tmp_path / "nodes").write_text("\n".join(damaged.values()) + "\n")
    for words, found in zip(damaged, host(tmp_path / "nodes").splitlines(), strict=True):
        assert found.startswith("refused: ")
        assert words in found


PARSE = """
import sys, tensorrt_rtx as trt
class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        print(message, flush=True)
logger = Logger()
builder = trt.Builder(logger)
assert builder.get_plugin_registry().load_library(sys.argv[1])
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
trt.OnnxParser(network, logger).parse_from_file(sys.argv[2])
"""


def parsed(plugin: Path, model: Path) -> str:
    """The messages of TensorRT-RTX while it parses. It has TensorRT's parser and registry, but supports no plugins: after
    creating one that it would add to the network, it ends the process."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("no ONNX parser of TensorRT: pip install tensorrt-rtx")
    command: list[Any] = [sys.executable, "-P", "-c", PARSE, plugin, model]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_parser_of_tensorrt_makes_plugins_of_a_compiled_node(plugin: Path, tmp_path: Path) -> None:
    model, _ = compiled_layer(geometry_of("clamped_swiglu", bias=True), MIXED, tmp_path)
    said = parsed(plugin, tmp_path / "layer.onnx")
    assert "Successfully created plugin: MoeLayer" in said
    (inputs,) = re.findall(r"\[MoeLayer\] inputs: (.*)", said)
    kinds = {TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.INT8: "INT8", TensorProto.INT32: "INT32"}
    (node,) = moe_nodes.moe_nodes(model)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = [f"({', '.join(map(str, held[name].dims))})[{kinds[held[name].data_type]}]" for name in node.input[3:]]
    assert re.findall(r"-> (\([^)]*\)\[\w+\])", inputs) == ["(-1, 128)[HALF]", "(-1, 2)[INT64]", "(-1, 2)[FLOAT]", *wanted]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("formats", [1, 2, 0, 1, 1, 2, 0, 7], "field formats has 7; 0 is float, 1 is int8, .*, 5 is int3, 6 is int2"),
        ("activation", "swish", "field activation has an activation that is unknown"),
        ("plugin_version", "2", "Plugin not found"),
    ],
)
def test_the_parser_of_tensorrt_tells_what_the_plugin_refuses(
    plugin: Path, name: str, value: Any, words: str, tmp_path: Path
) -> None:
    compiled_layer(geometry_of(), MIXED, tmp_path)
    model = onnx.load(tmp_path / "layer.onnx", load_external_data=False)
    (node,) = moe_nodes.moe_nodes(model)
    (attribute,) = (held for held in node.attribute if held.name == name)
    attribute.CopyFrom(helper.make_attribute(name, value))
    onnx.save(model, tmp_path / "damaged.onnx")
    said = parsed(plugin, tmp_path / "damaged.onnx")
    assert re.search(words, said)
    assert "Successfully created plugin" not in said


def test_it_exports_two_functions_and_needs_neither_tensorrt_nor_a_driver(plugin: Path) -> None:
    exported = checked("nm", "-D", "--defined-only", plugin)
    assert sorted(line.split()[-1] for line in exported.splitlines()) == ["getCreators", "setLoggerFinder"]
    needed = re.findall(r"NEEDED.*\[(.+)\]", checked("readelf", "-d", plugin))
    assert not [name for name in needed if re.search("cuda|nvinfer|cudart", name)]


def test_a_real_registry_lists_the_creator(plugin: Path) -> None:
    """With TensorRT's lean runtime, in a separate process."""
    if importlib.util.find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("no plugin registry: pip install tensorrt-lean-cu12-bindings tensorrt-lean-cu12-libs")
    script = """
import sys, tensorrt_lean_bindings as trt
registry = trt.Runtime(trt.Logger(trt.Logger.ERROR)).get_plugin_registry() if not hasattr(trt, "get_plugin_registry") \
    else trt.get_plugin_registry()
assert registry.load_library(sys.argv[1])
creator = registry.get_creator("MoeLayer", "1", "rq.moe")
print(type(creator).__name__, creator.name, [field.name for field in creator.field_names])
"""
    listed = checked(sys.executable, "-P", "-c", script, plugin)
    assert "IPluginCreatorV3One MoeLayer ['formats', 'activation', 'alpha', 'limit', 'shares']" in listed


def test_what_it_launches_is_the_layer(
    plugin: Path, headers: Headers, built_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a separate Python process, since Triton decides at import whether it interprets."""
    stand_in = stand_in_driver(tmp_path, headers)
    shared_host = shared_library("tensorrt_enqueue.cc", tmp_path / "libhost.so", headers)
    for name, path in (("PLUGIN", plugin), ("HOST", shared_host), ("STAND_IN", stand_in), ("KERNELS", built_kernels)):
        monkeypatch.setenv(f"RQ_{name}", str(path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "interpreted_plugin.py"]
    result = op_nodes.python_with(None, *arguments)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def embed(kernels: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [sys.executable, LAUNCHER / "embed.py", kernels, "-o", output]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_files_that_kernels_json_does_not_describe_are_not_embedded(built_kernels: Path, tmp_path: Path) -> None:
    shutil.copytree(built_kernels, tmp_path / "kernels")
    file = tmp_path / "kernels" / "sm80" / "dispatch_small.cubin"
    file.write_bytes(file.read_bytes() + b"\0")
    result = embed(tmp_path / "kernels", tmp_path / "out")
    assert result.returncode == 1
    assert "is not the file that kernels.json describes; build the kernels again" in result.stderr


def test_a_parameter_that_the_launcher_does_not_know_fails_the_build(
    built_kernels: Path, headers: Headers, tmp_path: Path
) -> None:
    shutil.copytree(built_kernels, tmp_path / "kernels")
    file = tmp_path / "kernels" / "kernels.json"
    document = json.loads(file.read_text())
    for name, kind in (("zero_points", "*i32"), ("experts", "*i32")):
        changed = json.loads(json.dumps(document))
        changed["kernels"][0]["parameters"][-1] = {"name": name, "type": kind}
        file.write_text(json.dumps(changed))
        assert embed(tmp_path / "kernels", tmp_path / "out").returncode == 0
        command: list[Any] = [
            "g++",
            "-std=c++17",
            "-fsyntax-only",
            "-I",
            LAUNCHER,
            "-I",
            headers[1],
            tmp_path / "out" / "table.cc",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert name in result.stderr
