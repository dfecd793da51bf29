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

pytestmark = pytest.mark.skipif(
    not Path("/usr/include/simde/x86/avx512.h").is_file(),
    reason="AVX-512 is emulated by SIMDe, which is not installed (Debian: libsimde-dev)",
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantizer's library on a processor that is said to have every instruction set."""
    library = tmp_path_factory.mktemp("emulated") / "library.so"
    options = ("-std=c++17", "-O2", "-fPIC", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno", "-pthread")
    processor = ("-DRQ_X86", "-D__builtin_cpu_supports(name)=1", "-I", SIMDE)
    subprocess.run(["g++", "-shared", *options, *processor, *SOURCES.glob("*.cc"), "-o", library], check=True)
    return library


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
