"""GPTQ's kernels for AVX-512 round as those of this processor do; without AVX-512 they run in an emulator."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rq_compile.quantization import library
from rq_compile.quantization.quantizer import stored
from rq_compile.quantization.second_moment import whole_moment

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins" / "quantizer" / "src"
SIMDE = ROOT / "tests" / "plugins" / "emulated" / "simde"
AVX512 = ("gptq_avx512", "gptq_avx512_vnni")
OTHERS = {"processor", "statistics", "gptq", "gptq_plain", "gptq_avx2", "decode", "decode_plain", "decode_avx2", "decode_avx512"}

pytestmark = pytest.mark.skipif(
    not Path("/usr/include/simde/x86/avx512.h").is_file(),
    reason="AVX-512 is emulated by SIMDe, which is not installed (Debian: libsimde-dev)",
)


def compiled(folder: Path, name: str, *arguments: str | Path) -> Path:
    target = folder / f"{name}.o"
    options = ("-std=c++17", "-O2", "-fPIC", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno", "-DRQ_X86")
    subprocess.run(["g++", *options, *arguments, "-c", SOURCES / f"{name}.cc", "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantizer's library on a processor that is said to have every instruction set."""
    folder = tmp_path_factory.mktemp("emulated")
    objects = [compiled(folder, name, "-I", SIMDE) for name in AVX512]
    objects += [compiled(folder, name, "-D__builtin_cpu_supports(name)=1", "-mavx2", "-mfma") for name in sorted(OTHERS)]
    subprocess.run(["g++", "-shared", *objects, "-o", folder / "library.so", "-pthread"], check=True)
    return folder / "library.so"


@pytest.mark.parametrize("isa", ["avx512", "avx512_vnni"])
def test_rounds_alike(emulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """But for rows from the first weight near a tie on."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((130, 160)).astype(np.float32)
    directions = random.standard_normal((300, 8)) @ random.standard_normal((8, 160))
    inputs = (directions + random.standard_normal((300, 160)) / 3).astype(np.float32)
    moment = whole_moment(inputs)
    expected = stored(weights, "int4", moment)
    monkeypatch.setenv("RQ_QUANTIZER_ISA", isa)
    monkeypatch.setattr(library, "LIBRARY", shutil.copy(emulated, tmp_path))  # a library chooses its kernels once
    library.quantizer_function.cache_clear()
    try:
        found = stored(weights, "int4", moment)
    finally:
        library.quantizer_function.cache_clear()
    assert np.isclose(found, expected, rtol=1e-4, atol=1e-6).mean() > 0.7
    error, expected_error = (np.square(inputs @ (kept - weights).T.astype(np.float64)).sum() for kept in (found, expected))
    np.testing.assert_allclose(error, expected_error, rtol=0.02)
