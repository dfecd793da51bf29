"""Engines with and without the op library, and their packages for a device."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from command_line import names

Command = Callable[..., Result]


@pytest.fixture(scope="module", params=["batched", "native"])
def engine(request: pytest.FixtureRequest) -> Path:
    """Two engines: one that needs no op library, and one that does."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def batched(compiled: Callable[[str, str], Path]) -> Path:
    return compiled("batched", "batched")


@pytest.fixture(scope="session")
def native(compiled: Callable[[str, str], Path]) -> Path:
    return compiled("cpu", "native")


@pytest.fixture(scope="session")
def compiled(
    rq_compile: Command, stages: Path, tiny_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    def compile_for(target: str, lowering: str) -> Path:
        folder = tmp_path_factory.mktemp(lowering)
        plan, path = folder / "plan.json", folder / "small.onnx"
        for arguments in (
            ("plan", stages / "calibration.json", "--target", target, "--memory", 0.6, "-o", plan),
            (tiny_checkpoint("olmoe"), "--plan", plan, "--lowering", lowering, "-o", path),
        ):
            result = rq_compile(*arguments, "-q")
            assert result.exit_code == 0, result.stderr
        return path

    return compile_for


@pytest.fixture
def packaged(rq_compile: Command, engine: Path, tmp_path: Path) -> Iterator[Path]:
    """A package in a folder that nobody may write to, without the engine it came from beside it. (The superuser may: so the
    contents are compared.)"""
    folder = tmp_path / "edge"
    result = rq_compile("package", engine, "--for", "edge", "-o", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files"] == names(folder)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
