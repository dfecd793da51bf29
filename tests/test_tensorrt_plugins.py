"""librq_tensorrt.so without TensorRT's builder and without a GPU."""

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import op_nodes
import plugin_builds
import pytest
from plugin_builds import ROOT, SANITIZED, SANITIZERS, checked, compiled, shared_library, stand_in_driver

LAUNCHER = ROOT / "plugins" / "launcher"


@pytest.fixture(scope="module")
def headers():
    """The folders of TensorRT's and of CUDA's headers."""
    package = importlib.util.find_spec("kernel_lens")
    if package is None:
        pytest.skip("no TensorRT headers: pip install kernel-lens")
    places = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    cuda = [place for place in [*places, *Path("/usr/local").glob("cuda*/include")] if (place / "cuda.h").exists()]
    if not cuda:
        pytest.skip("no CUDA headers: install a toolkit or set CUDA_HOME")
    return Path(package.submodule_search_locations[0]) / "include" / "tensorrt", cuda[0]


def library(folder, headers, kernels, *options):
    where = [f"-DTENSORRT_INCLUDE_DIR={headers[0]}", f"-DCUDA_INCLUDE_DIR={headers[1]}"]
    return plugin_builds.library("tensorrt", "librq_tensorrt.so", folder, kernels, *where, *options)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory, headers, built_kernels):
    return library(tmp_path_factory.mktemp("plugin"), headers, built_kernels)


@pytest.fixture(scope="module")
def host(tmp_path_factory, headers, described_kernels):
    """Runs the host program with a library, both of which check themselves."""
    folder = tmp_path_factory.mktemp("sanitized")
    checking = library(folder, headers, described_kernels, *SANITIZED)
    program = compiled("tensorrt_host.cc", folder / "host", headers, "-g", f"-fsanitize={SANITIZERS}")
    environment = os.environ | {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    return lambda *arguments: checked(program, checking, *arguments, env=environment)


def test_everything_up_to_enqueue_right_and_wrong(host):
    assert "0 failures" in host()


def test_random_fields_and_shapes_break_nothing(host):
    seed = secrets.randbits(31)
    made = re.search(r"(\d+) made, (\d+) configured", host(seed, 4000))
    assert made, f"seed {seed}"


def test_it_exports_two_functions_and_needs_neither_tensorrt_nor_a_driver(plugin):
    exported = checked("nm", "-D", "--defined-only", plugin)
    assert sorted(line.split()[-1] for line in exported.splitlines()) == ["getCreators", "setLoggerFinder"]
    needed = re.findall(r"NEEDED.*\[(.+)\]", checked("readelf", "-d", plugin))
    assert not [name for name in needed if re.search("cuda|nvinfer|cudart", name)]


def test_a_real_registry_lists_the_creator(plugin):
    """Of TensorRT's lean runtime, in a process of its own."""
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
    listed = checked(sys.executable, "-c", script, plugin)
    assert "IPluginCreatorV3One MoeLayer ['formats', 'activation', 'alpha', 'limit', 'shares']" in listed


def test_what_it_launches_is_the_layer(plugin, headers, built_kernels, tmp_path, monkeypatch):
    """In another Python: whether Triton interprets is decided when it is first imported."""
    stand_in = stand_in_driver(tmp_path, headers)
    shared_host = shared_library("tensorrt_enqueue.cc", tmp_path / "libhost.so", headers)
    for name, path in (("PLUGIN", plugin), ("HOST", shared_host), ("STAND_IN", stand_in), ("KERNELS", built_kernels)):
        monkeypatch.setenv(f"RQ_{name}", str(path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "interpreted_plugin.py"]
    result = op_nodes.python_with(None, *arguments)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def embed(kernels, output):
    command = [sys.executable, LAUNCHER / "embed.py", kernels, "-o", output]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_files_that_kernels_json_does_not_describe_are_not_embedded(built_kernels, tmp_path):
    shutil.copytree(built_kernels, tmp_path / "kernels")
    file = tmp_path / "kernels" / "sm80" / "dispatch_small.cubin"
    file.write_bytes(file.read_bytes() + b"\0")
    result = embed(tmp_path / "kernels", tmp_path / "out")
    assert result.returncode == 1
    assert "is not the file that kernels.json describes; build the kernels again" in result.stderr


def test_a_parameter_that_the_launcher_does_not_know_fails_the_build(built_kernels, headers, tmp_path):
    shutil.copytree(built_kernels, tmp_path / "kernels")
    file = tmp_path / "kernels" / "kernels.json"
    document = json.loads(file.read_text())
    for name, kind in (("zero_points", "*i32"), ("experts", "*i32")):
        changed = json.loads(json.dumps(document))
        changed["kernels"][0]["parameters"][-1] = {"name": name, "type": kind}
        file.write_text(json.dumps(changed))
        assert embed(tmp_path / "kernels", tmp_path / "out").returncode == 0
        command = ["g++", "-std=c++17", "-fsyntax-only", "-I", LAUNCHER, "-I", headers[1], tmp_path / "out" / "table.cc"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert name in result.stderr
