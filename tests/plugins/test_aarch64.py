"""The op library for 64-bit ARM in qemu: the tests of the ops, the same bits as on this machine, and a packaged engine."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from op_nodes import python_with
from test_activation_bits import PRINT_DIGEST

import rq_compile
from rq_compile.engine.library import library_path
from rq_compile.runtime.engine import Engine

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
PYTHON = ROOT / ".venv-aarch64" / "bin" / "python"
LIBRARY = Path(rq_compile.__file__).parent / "lib" / "aarch64" / "librq_moe.so"
pytestmark = pytest.mark.skipif(
    not (PYTHON.is_file() and LIBRARY.is_file()), reason=f"no {PYTHON} or no {LIBRARY}: run make aarch64"
)
# The sets that a processor of qemu supports, best first.
PROCESSORS = {
    "max": ["neon_i8mm", "neon_dotprod", "neon", "plain"],
    "neoverse-n1": ["neon_dotprod", "neon", "plain"],
    "cortex-a72": ["neon", "plain"],
}
# The tests of the ops that run with the best set of each processor. Others start a Python of their own, or take long in qemu.
OPS = {
    "max": "every_format and (300 or 37) or every_block or one_slot and 20- or empty",
    "neoverse-n1": "every_block or one_slot and 20- or empty",
    "cortex-a72": "every_block or one_slot and 20- or empty",
}
Runs = Callable[..., "subprocess.CompletedProcess[str]"]


def environment_of(processor: str, isa: str, *python_path: Path) -> dict[str, str]:
    return os.environ | {"QEMU_CPU": processor, "RQ_MOE_ISA": isa, "PYTHONPATH": os.pathsep.join(map(str, python_path))}


@pytest.fixture(scope="module")
def in_qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs Python for ARM on a processor of qemu, with this package and its op library for ARM."""
    folder = tmp_path_factory.mktemp("aarch64")
    package = folder / "rq_compile"
    shutil.copytree(Path(rq_compile.__file__).parent, package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    shutil.copy(LIBRARY, package / "lib")

    def run(processor: str, *arguments: object, isa: str = "") -> "subprocess.CompletedProcess[str]":
        environment = environment_of(processor, isa, folder, SUPPORT)
        command = [str(part) for part in (PYTHON, *arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    yield run
    shutil.rmtree(folder)


def nodes_in_qemu(processor: str, isa: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs Python of this machine, with only the nodes of ``run_op`` on a processor of qemu, as qemu takes long for the rest."""
    # The path of this machine's Python may lead to its numpy, which ARM's cannot load.
    runner = shlex.join(map(str, ("env", "-u", "PYTHONPATH", PYTHON, SUPPORT / "node_runner.py", LIBRARY)))
    environment = environment_of(processor, isa, Path(rq_compile.__file__).parent.parent, SUPPORT)
    command = [sys.executable, *map(str, arguments)]
    options: Any = {"cwd": SUPPORT, "capture_output": True, "text": True, "check": False}
    return subprocess.run(command, env=environment | {"RQ_NODE_RUNNER": runner}, **options)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_ops(processor: str) -> None:
    files = [ROOT / "tests" / "plugins" / f"{name}.py" for name in ("test_ops", "test_activation_bits")]
    options = ["-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", "-k", OPS[processor]]
    result = nodes_in_qemu(processor, PROCESSORS[processor][0], "-m", "pytest", *options, *files)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


def test_attention(in_qemu: Runs) -> None:
    """In one process, because its imports take seconds in qemu."""
    both = "import cache_attention, latent_attention; cache_attention.main(); latent_attention.main()"
    for isa in ("neon", "plain"):
        result = in_qemu("cortex-a72", "-c", both, isa=isa)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_processor_gets_its_best_set(processor: str) -> None:
    result = nodes_in_qemu(processor, "none", "-c", PRINT_DIGEST)
    assert f"the instruction sets that run here: {', '.join(PROCESSORS[processor])};" in result.stderr


def test_the_same_bits_as_on_this_machine() -> None:
    here = python_with(None, "-c", PRINT_DIGEST)
    assert here.returncode == 0, here.stderr
    for isa in PROCESSORS["max"]:
        result = nodes_in_qemu("max", isa, "-c", PRINT_DIGEST)
        assert (result.returncode, result.stdout) == (0, here.stdout), result.stderr


def test_a_packaged_engine(in_qemu: Runs, rq_compile: Callable, stages: Path, tmp_path: Path) -> None:
    """Without --library, the one that was built for the architecture is packed."""
    engine, packaged = stages / "model.onnx", tmp_path / "edge"
    result = rq_compile("package", engine, "--for", "edge", "--architecture", "aarch64", "-o", packaged)
    assert result.exit_code == 0, result.stderr
    assert (packaged / "librq_moe.so").read_bytes() == LIBRARY.read_bytes()
    assert (packaged / "librq_moe.so").read_bytes() != library_path().read_bytes()
    prompt = [5, 9, 17, 3]
    expected = list(Engine.load(engine, threads=1).generate(prompt, 6))
    for processor in PROCESSORS:
        said = in_qemu(processor, packaged / "generate.py", "--ids", *prompt, "--tokens", 6)
        assert [int(token) for token in said.stdout.split()] == expected, said.stderr
