"""Kernels, and libraries that use the launcher, built for tests; conftest.py has the fixtures, so that kernels are built once."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "plugins"
# The kernels that layers of mixed formats in fp16 need, with few bits and without.
BUILT = [
    "dispatch_*",
    "combine_fp16",
    *(f"{product}_fp16_{mix}_*" for product in ("up_gated", "down") for mix in ("mixed", "few")),
]
SANITIZERS = "address,undefined"
SANITIZED = [f"-DRQ_SANITIZE={SANITIZERS}", "-DCMAKE_BUILD_TYPE=Debug"]


def checked(*command: object, **options: Any) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout


def compiled(source: str, output: Path, headers: Sequence[Path], *options: str) -> Path:
    """A program or library from a source file of the tests."""
    folders = [part for folder in headers for part in ("-isystem", folder)]
    checked("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *folders, *options, TESTS / source, "-ldl", "-o", output)
    return output


def shared_library(source: str, output: Path, headers: Sequence[Path], *options: str) -> Path:
    return compiled(source, output, headers, "-shared", "-fPIC", *options)


def stand_in_driver(folder: Path, headers: Sequence[Path]) -> Path:
    """A libcuda.so.1; a library that searches for the driver by this name finds it already loaded."""
    return shared_library("cuda_stand_in.cc", folder / "libcuda.so.1", headers, "-Wl,-soname,libcuda.so.1")


def library(plugin: str, name: str, folder: Path, kernels: Path, *options: str) -> Path:
    """The library of `plugins/<plugin>`, compiled with warnings as errors."""
    found = [f"-DRQ_KERNELS={kernels}", f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS=-Werror"]
    checked("cmake", "-S", ROOT / "plugins" / plugin, "-B", folder, *found, *options)
    checked("cmake", "--build", folder, "--parallel", "2")
    return folder / name


@pytest.fixture(scope="session")
def built_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    build = ROOT / "plugins" / "kernels" / "build.py"
    checked(sys.executable, build, "-o", folder, "--sm", "80", "--jobs", "2", "--only", *BUILT)
    # The files of SM 80 represent those of an SM with instructions that no other SM has.
    described = json.loads((folder / "kernels.json").read_text())
    for kernel in described["kernels"]:
        kernel["builds"].append(kernel["builds"][0] | {"sm": 120, "portable_ptx": False})
    (folder / "kernels.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="session")
def described_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernels.json with every kernel, and one invalid image: enough for everything but a launch."""
    folder = tmp_path_factory.mktemp("described_kernels")
    (folder / "image").write_bytes(b"none")
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])  # before the package `build`
from build import describe
from rq_kernels import tiles
from rq_kernels.variants import variants
build = json.loads(sys.argv[2])
kernels = [describe(v, [build | {"entry": v.name}]) for v in variants()]
print(json.dumps({"version": 1, "tiles": tiles.rule(), "kernels": kernels}))
"""
    image = {"file": "image", "sha256": hashlib.sha256(b"none").hexdigest()}
    build = {"sm": 80, "shared": 0, "portable_ptx": True, "cubin": image, "ptx": image}
    described = checked(sys.executable, "-P", "-c", script, ROOT / "plugins" / "kernels", json.dumps(build))
    (folder / "kernels.json").write_text(described)
    return folder


@pytest.fixture(scope="session")
def cuda_headers() -> Path:
    """CUDA's headers, as included in Triton: no toolkit is needed."""
    package = importlib.util.find_spec("triton")
    if package is None or not package.submodule_search_locations:
        pytest.skip("no CUDA headers: pip install triton")
    return Path(package.submodule_search_locations[0]) / "backends" / "nvidia" / "include"


def cuda_library(folder: Path, headers: Path, kernels: Path, *options: str) -> Path:
    return library("cuda", "librq_moe_cuda.so", folder, kernels, f"-DCUDA_INCLUDE_DIR={headers}", *options)


@pytest.fixture(scope="session")
def cuda_ops(tmp_path_factory: pytest.TempPathFactory, cuda_headers: Path, built_kernels: Path) -> Path:
    """librq_moe_cuda.so."""
    return cuda_library(tmp_path_factory.mktemp("cuda_ops"), cuda_headers, built_kernels)


@pytest.fixture(scope="session")
def cuda_parts(tmp_path_factory: pytest.TempPathFactory, cuda_headers: Path) -> dict[str, str]:
    """A library that adds the ops to ONNX Runtime's CPU provider, and a driver for them, by the variables with their paths."""
    folder = tmp_path_factory.mktemp("cuda_parts")
    interface = f"-I{ROOT / 'plugins' / 'onnxruntime' / 'src'}"
    host = shared_library("cuda_ops_on_host.cc", folder / "libhost.so", [cuda_headers], interface)
    return {"RQ_HOST": str(host), "RQ_STAND_IN": str(stand_in_driver(folder, [cuda_headers]))}
