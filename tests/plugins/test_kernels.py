"""The GPU kernels without a GPU: interpreted and compared with float64, and compiled ahead of time for every SM."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import op_nodes
import pytest

sys.path.append(str(Path(__file__).parents[2] / "plugins" / "kernels"))

from rq_kernels import tiles

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "plugins" / "kernels"
SMS = [80, 89, 90, 100, 120]
# Large, small, all formats and one; the others differ in constants.
BUILT = ["dispatch_count", "dispatch_scan", "dispatch_scatter", "dispatch_small", "combine_bf16"]
PRODUCTS = ["up_gated_bf16_mixed_decode", "down_fp16_int4_prefill"]
PTX_TYPES = {"i32": "u32", "fp32": "f32"}
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of a program, from the CUDA programming guide


Built = tuple[Path, dict[str, Any]]


def build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [sys.executable, KERNELS / "build.py", "-o", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The folder and its kernels.json."""
    folder = tmp_path_factory.mktemp("kernels")
    result = build(folder, "--only", *BUILT, *PRODUCTS)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, json.loads((folder / "kernels.json").read_text())


def builds(built: Built, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any], bytes]]:
    folder, described = built
    for kernel in described["kernels"]:
        for one in kernel["builds"]:
            yield kernel, one, (folder / one[kind]["file"]).read_bytes()


def test_numerics_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a separate Python process, since Triton decides at import whether it interprets."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "interpreted_kernels.py"]
    result = op_nodes.python_with(None, *arguments)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_every_kernel_is_built_for_every_sm(built: Built) -> None:
    _, described = built
    assert sorted(kernel["name"] for kernel in described["kernels"]) == sorted(BUILT + PRODUCTS)
    for kernel, one, cubin in builds(built, "cubin"):
        assert [each["sm"] for each in kernel["builds"]] == SMS
        assert cubin[:4] == b"\x7fELF"
        assert hashlib.sha256(cubin).hexdigest() == one["cubin"]["sha256"]


def test_ptx_is_what_the_description_says(built: Built) -> None:
    for kernel, one, ptx in builds(built, "ptx"):
        text = ptx.decode()
        assert f".version {built[1]['ptx']}\n" in text
        target = re.search(r"^\.target (sm_\d+)(a?)$", text, re.MULTILINE)
        assert target is not None
        assert target[1] == f"sm_{one['sm']}"
        assert one["portable_ptx"] == (target[2] == "")
        assert f".entry {one['entry']}(" in text
        assert f".reqntid {32 * kernel['warps']}" in text
        types = re.findall(r"^\s*\.param \.(\w+)", text, re.MULTILINE)
        declared = ["u64" if p["type"][0] == "*" else PTX_TYPES[p["type"]] for p in kernel["parameters"]]
        assert types == declared + ["u64"] * len(kernel["hidden_parameters"])
        assert str(ROOT).encode() not in ptx, "a path of this machine"


def test_grids_and_tiles_are_those_of_the_launcher(built: Built) -> None:
    _, described = built
    kernels = {kernel["name"]: kernel for kernel in described["kernels"]}
    decode, prefill = tiles.UP["decode"], tiles.DOWN["prefill"]
    assert kernels["up_gated_bf16_mixed_decode"]["grid"] == ["row_tiles", f"ceil(outputs / {decode.outputs})", "1"]
    assert kernels["down_fp16_int4_prefill"]["grid"] == ["row_tiles", f"ceil(outputs / {prefill.outputs})", "1"]
    assert kernels["dispatch_count"]["grid"] == [f"ceil(pairs / {tiles.CHUNK})", "1", "1"]
    assert described["tiles"]["rows"] == {name: tile.rows for name, tile in tiles.UP.items()}


def test_ptx_is_old_enough_for_the_driver_floor(built: Built) -> None:
    """PTX 9.0 came with CUDA 13.0 and the 580 driver, 8.7 with CUDA 12.8 and 570.26."""
    _, described = built
    assert described["ptx"] == "8.7"
    assert described["ptxas"].startswith("12."), "a cubin of CUDA 13 needs a 580 driver: say so in docs/kernels.md"
    assert described["linux_driver_at_least"] == {"ptx": "570.26", "cubin": "525.60.13", "sm_100_and_later": "570.26"}


def test_portable_ptx_serves_gpus_that_have_no_cubin(built: Built, tmp_path: Path) -> None:
    """SM 86 and 103 represent them, and Triton's ptxas represents the driver."""
    from triton import knobs

    for kernel, one, _ in builds(built, "ptx"):
        if one["sm"] == 80 and kernel["name"] in ("dispatch_small", "up_gated_bf16_mixed_decode"):
            for sm in ("sm_86", "sm_103"):
                command: list[Any] = [
                    knobs.nvidia.ptxas.path,
                    f"--gpu-name={sm}",
                    built[0] / one["ptx"]["file"],
                    "-o",
                    tmp_path / sm,
                ]
                assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_registers_shared_memory_and_spills_are_bounded(built: Built) -> None:
    for kernel, one, _ in builds(built, "cubin"):
        assert one["spilled"] <= (16 if "prefill" in kernel["name"] else 0), f"{kernel['name']} sm{one['sm']}: {one['spilled']}"
        assert one["shared"] <= SHARED[one["sm"]] * 1024
        programs = 65536 // (one["registers"] * 32 * kernel["warps"])
        # A decode step waits for memory: only several programs per SM keep enough reads in flight.
        assert programs >= (3 if kernel["name"] == "up_gated_bf16_mixed_decode" else 1), f"sm{one['sm']}: {one['registers']}"


def test_same_source_same_bytes(built: Built, tmp_path: Path) -> None:
    name = "dispatch_small"
    assert build(tmp_path, "--only", name, "--sm", "90", "--jobs", "1").returncode == 0
    for kind in ("cubin", "ptx"):
        assert (tmp_path / "sm90" / f"{name}.{kind}").read_bytes() == (built[0] / "sm90" / f"{name}.{kind}").read_bytes()


def test_a_kernel_that_is_not_there(tmp_path: Path) -> None:
    result = build(tmp_path, "--only", "up_sideways")
    assert result.returncode == 2
    assert "no kernel is called up_sideways; the names are in rq_kernels/variants.py" in result.stderr


def test_check_on_gpu_runs_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    script: list[Any] = [sys.executable, KERNELS / "check_on_gpu.py"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused = subprocess.run(script, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no GPU here; on a CPU set TRITON_INTERPRET=1" in refused.stderr
    arguments = ["--device", "cpu", "--quick", "--only", "one token", "--seed", "5"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    passed = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert passed.returncode == 0, passed.stderr
    assert "2 of 2 cases are right" in passed.stdout


def test_nothing_in_the_package_imports_triton_the_language() -> None:
    sources = (ROOT / "rq_compile").rglob("*.py")
    assert not [str(path) for path in sources if re.search(r"^\s*(import|from) triton\b", path.read_text(), re.MULTILINE)]


def test_few_rows_small_tiles_many_rows_large_tiles() -> None:
    assert tiles.choose([1] * 8) == "decode"
    assert tiles.choose([16] * 64) == "decode"
    assert tiles.choose([40] * 64) == "batch"
    assert tiles.choose([512] * 64) == "prefill"
    assert tiles.choose([]) == "decode"
    assert tiles.choose([512] * 64, tiles.FEW_BITS) == "batch"


def test_the_choice_is_the_cheapest_and_grows_with_the_batch() -> None:
    random = np.random.default_rng(0)
    rows_of = {name: tile.rows for name, tile in tiles.UP.items()}
    for _ in range(50):
        shares = random.dirichlet(random.uniform(0.1, 2, 16)).tolist()
        costs = lambda rows: {name: tiles.cost(rows, size) for name, size in rows_of.items()}  # noqa: E731
        for pairs in (1, 8, 100, 1000, 30000):
            rows = tiles.expected_rows(shares, pairs)
            assert costs(rows)[tiles.choose(rows)] == min(costs(rows).values())
        few, many = (tiles.choose(tiles.expected_rows(shares, pairs)) for pairs in (8, 1_000_000))
        assert rows_of[few] <= 64
        assert many == "prefill"


def test_one_busy_slot_among_idle_ones_decides() -> None:
    """Tiles of 16 rows would read the busy slot's weights 63 times."""
    assert tiles.choose([1] * 15 + [1000]) == "prefill"
    assert tiles.choose([1] * 63 + [30]) == "batch"


@pytest.mark.parametrize("name", tiles.UP)
def test_both_products_share_their_row_tiles(name: str) -> None:
    assert tiles.UP[name].rows == tiles.DOWN[name].rows
