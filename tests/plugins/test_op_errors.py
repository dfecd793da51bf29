"""Errors of an op: an exception in a tile, and a set of kernels that the processor does not support."""

import subprocess
from pathlib import Path

import pytest
from op_nodes import python_with

SOURCES = Path(__file__).parents[2] / "plugins" / "onnxruntime" / "src"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "tile_errors"
    source = Path(__file__).with_name("tile_errors.cc")
    subprocess.run(["g++", "-std=c++17", "-pthread", "-Wall", "-Werror", "-I", SOURCES, source, "-o", path], check=True)
    return path


@pytest.mark.parametrize(
    ("tiles", "bad", "kind", "message"),
    [
        (1, "0", "error", "rq.moe Test: tile 0 is wrong"),
        (8, "0", "error", "rq.moe Test: tile 0 is wrong"),
        (8, "7", "error", "rq.moe Test: tile 7 is wrong"),
        (8, "all", "error", "rq.moe Test: a tile is wrong"),
        (8, "3", "memory", "rq.moe Test: std::bad_alloc"),
        (8, "3", "number", "rq.moe: unknown failure"),
        (8, "8", "error", "no error"),
        (0, "0", "error", "no error"),
    ],
)
def test_the_first_exception_of_a_tile_is_the_ops(program: Path, tiles: int, bad: str, kind: str, message: str) -> None:
    result = subprocess.run([program, str(tiles), bad, kind], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == message


ONE_GEMM = """
import numpy as np, op_nodes
weights = op_nodes.pack(np.random.default_rng(0), [1], 16, 32)
x = np.ones((1, 32), np.float32)
op_nodes.expert_gemm(x, np.zeros(1, np.int32), np.array([0, 1], np.int32), weights)
"""


def instruction_sets() -> list[str]:
    """The sets of kernels that this processor supports, named as in the README of the library."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.is_file() else set()
    needs = {
        "amx": {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
        "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
        "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avxvnni": {"avx2", "fma", "avx_vnni"},
        "avx2": {"avx2", "fma"},
    }
    return [name for name, flag in needs.items() if flag <= flags] + ["plain"]


def unknown_sets() -> list[str]:
    known = ["amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2"]
    return ["avx2x", "AVX2", "avx", " plain", *(name for name in known if name not in instruction_sets())]


@pytest.mark.parametrize("isa", unknown_sets())
def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are(isa: str) -> None:
    result = python_with(isa, "-c", ONE_GEMM)
    assert result.returncode != 0
    there = ", ".join(instruction_sets())
    assert f"RQ_MOE_ISA is '{isa}', which is not one of the instruction sets that run here: {there}; unset it" in result.stderr


@pytest.mark.parametrize("isa", [None, *instruction_sets()])
def test_each_instruction_set_that_is_there_is_taken(isa: str | None) -> None:
    assert python_with(isa, "-c", ONE_GEMM).returncode == 0
