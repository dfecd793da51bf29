"""The quantizer's kernels for AVX-512 round and multiply as those of this processor do; without AVX-512 they run in an
emulator."""

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from instruction_sets import kernels_of

from rq_compile.quantization.feedback import feedback_of
from rq_compile.quantization.gptq import Rounded
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


@pytest.fixture(params=["avx512", "avx512_vnni"])
def of_other_processor(request: pytest.FixtureRequest, emulated: Path) -> Callable[[], AbstractContextManager[None]]:
    """Contexts in which the kernels of an instruction set run."""
    return lambda: kernels_of(request.param, emulated)


def test_rounds_alike(of_other_processor: Callable[[], AbstractContextManager[None]]) -> None:
    """But for rows from the first weight near a tie on."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((130, 160)).astype(np.float32)
    directions = random.standard_normal((300, 8)) @ random.standard_normal((8, 160))
    inputs = (directions + random.standard_normal((300, 160)) / 3).astype(np.float32)
    moment = whole_moment(inputs)
    expected = stored(weights, "int4", moment)
    with of_other_processor():
        found = stored(weights, "int4", moment)
    assert np.isclose(found, expected, rtol=1e-4, atol=1e-6).mean() > 0.7
    error, expected_error = (np.square(inputs @ (kept - weights).T.astype(np.float64)).sum() for kept in (found, expected))
    np.testing.assert_allclose(error, expected_error, rtol=0.02)


@pytest.mark.parametrize("block", [16, 48, 128])
def test_rounds_factors_alike(of_other_processor: Callable[[], AbstractContextManager[None]], block: int) -> None:
    """In blocks narrower than a vector, too. A factor near a tie changes the factors of later columns a little."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((500, 20)) @ random.standard_normal((20, 300))
    values = whole_moment((directions + random.standard_normal((500, 300))).astype(np.float32)).values
    expected = feedback_of(values, block)
    with of_other_processor():
        found = feedback_of(values, block)
    assert (found.across == expected.across).mean() > 0.97
    assert np.abs(found.across.astype(int) - expected.across).max() <= 2
    np.testing.assert_allclose(found.units, expected.units, rtol=0.05, atol=0.01 * expected.units.max())


def test_multiplies_alike(of_other_processor: Callable[[], AbstractContextManager[None]]) -> None:
    """But for inputs between two whole numbers of their units."""
    random = np.random.default_rng(0)
    matrix = Rounded(random.integers(-127, 128, (70, 3, 128)).astype(np.int8), np.ones((70, 3), np.float32), 380)
    inputs = random.standard_normal((380, 67)).astype(np.float32)
    expected = matrix.times(inputs)
    with of_other_processor():
        found = matrix.times(inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
