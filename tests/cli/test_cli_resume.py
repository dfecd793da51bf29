"""A compilation that was killed continues where it stopped, and writes the same files as without the interruption."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from command_line import Run, names, python, refused, writing

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.cli.main import main
from rq_compile.export.exported import Exported
from rq_compile.targets import onnxruntime as target

PARTS = [".model.onnx.data.journal", ".model.onnx.data.partial"]
PROGRAM = """
import os, pathlib, pickle, sys, time
import rq_compile.targets.onnxruntime as target
from rq_compile.architectures.model import Model
target.export_graph = lambda _: pickle.load(open(sys.argv[1], "rb"))
journal = pathlib.Path(sys.argv[-1]).parent / ".model.onnx.data.journal"
read = Model.matrix
def stop_in_the_second_layer(model, layer, expert, projection):
    if layer.index == 1 and projection == "down":
        while not journal.exists() or "layers.0.mlp.experts" not in journal.read_text():
            time.sleep(0.01)  # the file follows the threads that compute
        os.write(1, b"stopped\\n")  # at once: several threads come here
        time.sleep(600)
    return read(model, layer, expert, projection)
Model.matrix = stop_in_the_second_layer
from rq_compile.cli.main import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def exported(export_once: Callable, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "exported"
    path.write_bytes(pickle.dumps(export_once(Model.open(tiny_checkpoint("olmoe")))))
    return path


class Killed(NamedTuple):
    folder: Path
    refusal: str


@pytest.fixture(scope="module")
def killed(
    exported: Path, tiny_checkpoint: Callable[[str], Path], stages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Killed:
    """The files left by kill -9 in the middle of the second layer, and the message to a second process meanwhile. Do not write to
    it."""
    folder, model = tmp_path_factory.mktemp("killed"), tiny_checkpoint("olmoe")
    arguments = [str(argument) for argument in writing("compile", model, stages, folder)]
    process = python("-c", PROGRAM, str(exported), *arguments)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "stopped\n", process.stderr.read()
    from click.testing import CliRunner

    refusal = CliRunner().invoke(main, [*arguments, "-q"])
    process.kill()
    process.wait()
    refused(refusal, 2, "another rq-compile is writing", "model.onnx.data")
    return Killed(folder, refusal.stderr)


@pytest.fixture
def left(killed: Killed, out: Path) -> Path:
    """A copy of what the killed process left of the weights."""
    for name in PARTS:
        shutil.copy(killed.folder / name, out)
    return out


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The layers whose experts were read."""
    found: set[int] = set()

    original = Model.matrix

    def remember(model: Model, layer: MoeLayer, *what: Any) -> np.ndarray:
        found.add(layer.index)
        return original(model, layer, *what)

    monkeypatch.setattr(Model, "matrix", remember)
    return found


def same_engine(stages: Path, out: Path) -> None:
    assert names(out) == [path.name for path in sorted(stages.glob("model.*"))]
    for path in out.iterdir():
        assert path.read_bytes() == (stages / path.name).read_bytes(), path.name


def test_it_goes_on_after_the_last_whole_layer(rq_compile: Run, model: Path, stages: Path, left: Path, read: set[int]) -> None:
    result = rq_compile(*writing("compile", model, stages, left))
    assert result.exit_code == 0, result.stderr
    assert "continuing model.onnx.data after model.layers.0.mlp.experts" in result.stderr
    assert "GB/s" in result.stderr
    assert read == {1}
    same_engine(stages, left)


def test_it_starts_over_with_fresh(rq_compile: Run, model: Path, stages: Path, left: Path, read: set[int]) -> None:
    assert rq_compile(*writing("compile", model, stages, left), "--fresh", "-q").exit_code == 0
    assert read == {0, 1}
    same_engine(stages, left)


def test_a_flipped_bit_is_found(rq_compile: Run, model: Path, stages: Path, left: Path, read: set[int]) -> None:
    content = bytearray((left / PARTS[1]).read_bytes())
    content[len(content) // 2] ^= 4
    (left / PARTS[1]).write_bytes(content)
    result = rq_compile(*writing("compile", model, stages, left))
    assert "of the partial file differs from what was written" in result.stderr
    assert read == {0, 1}
    same_engine(stages, left)


def test_a_shard_that_was_written_again_starts_over(
    rq_compile: Run, model: Path, stages: Path, left: Path, read: set[int], tmp_path: Path
) -> None:
    """A weight in the middle of a tensor, which the fingerprint does not cover, may have changed."""
    again = shutil.copytree(model, tmp_path / model.name, copy_function=shutil.copy2)
    shard = again / "model.safetensors"
    assert Model.open(again).version == Model.open(model).version
    shard.write_bytes(shard.read_bytes())
    result = rq_compile(*writing("compile", again, stages, left))
    assert "was begun with another version of the shards; starting over" in result.stderr
    assert read == {0, 1}
    same_engine(stages, left)


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--lowering", "stock"), "lowering and dense format"), (("--plan", "other.json"), "plan and activation statistics")],
)
def test_another_engine_starts_over(
    rq_compile: Run, model: Path, stages: Path, left: Path, read: set[int], tmp_path: Path, options: tuple[str, str], named: str
) -> None:
    if options[0] == "--plan":
        (tmp_path / "text.txt").write_text("Another text. " * 40)
        calibration, plan = tmp_path / "calibration.json", tmp_path / "other.json"
        options = ("--plan", str(plan))
        assert rq_compile("calibrate", model, "--text", tmp_path / "text.txt", "-o", calibration, "-q").exit_code == 0
        assert rq_compile("plan", calibration, "-o", plan, "-q").exit_code == 0
    result = rq_compile(*writing("compile", model, stages, left), *options)
    assert result.exit_code == 0, result.stderr
    assert f"the partial model.onnx.data was begun with another {named}; starting over" in result.stderr
    assert read == {0, 1}
    assert not set(PARTS) & set(names(left))


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_change_nothing(rq_compile: Run, model: Path, stages: Path, out: Path, threads: int) -> None:
    assert rq_compile(*writing("compile", model, stages, out), "--threads", threads, "-q").exit_code == 0
    same_engine(stages, out)


@pytest.mark.parametrize("lowering", ["stock", "batched"])
def test_threads_change_nothing_in_other_lowerings(
    model: Path, stages: Path, tmp_path: Path, export_once: Callable[[Model], Exported], lowering: str
) -> None:
    from rq_compile.calibration.statistics import Statistics
    from rq_compile.files import read_document
    from rq_compile.planning.schema import Plan

    checkpoint, plan = Model.open(model), read_document(Plan, stages / "plan.json")
    assert plan.quantizer == "gptq"
    assert plan.statistics is not None
    statistics = Statistics.beside(stages, plan.statistics)
    exported = export_once(checkpoint)
    found = []
    for threads in (1, 4):
        output = tmp_path / f"{threads}.onnx"
        target.compile_engine(checkpoint, plan, output, lowering, statistics, exported, writing=target.Writing(threads))
        found.append(output.with_suffix(".onnx.data").read_bytes())
    assert found[0] == found[1]
