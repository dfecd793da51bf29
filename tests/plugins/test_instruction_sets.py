"""Kernels for instruction sets that this processor may lack, run in an emulator, agree with the plain ones."""

import subprocess
from pathlib import Path

import pytest

EMULATED = Path(__file__).parent / "emulated"
SOURCES = Path(__file__).parents[2] / "plugins" / "onnxruntime" / "src"
PLAIN = tuple(SOURCES / f"{name}.cc" for name in ("self_check", "kernels", "kernels_plain"))
SIMDE = Path("/usr/include/simde/x86/avx512.h")


def has_avx2() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx2" in info.read_text().split()


def built(program: Path, *arguments: str | Path) -> Path:
    subprocess.run(["g++", "-std=c++17", "-ffp-contract=off", "-I", SOURCES, *arguments, *PLAIN, "-o", program], check=True)
    return program


@pytest.mark.skipif(not has_avx2(), reason="the processor has no AVX2, in which AVX-VNNI is emulated")
def test_avx_vnni(tmp_path: Path) -> None:
    options = ("-Wall", "-Wextra", "-Werror", "-mavx2", "-mfma", "-mf16c")
    program = built(tmp_path / "avxvnni", *options, SOURCES / "kernels_avx2.cc", EMULATED / "avxvnni.cc")
    assert subprocess.run([program]).returncode == 0
    assert subprocess.run([program, "wrong"]).returncode == 1


@pytest.mark.skipif(not SIMDE.is_file(), reason="AVX-512 is emulated by SIMDe, which is not installed (Debian: libsimde-dev)")
def test_avx512_and_amx(tmp_path: Path) -> None:
    kernels = [SOURCES / f"kernels_{name}.cc" for name in ("avx512", "avx512vnni", "avx512bf16", "amx")]
    program = built(tmp_path / "avx512", "-I", EMULATED / "simde", *kernels, EMULATED / "avx512.cc", EMULATED / "tiles.cc")
    assert subprocess.run([program]).returncode == 0
    assert subprocess.run([program, "wrong"]).returncode == 1
