"""Outputs of commands: complete or absent, and the same bytes every time."""

import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Run, names, python, refused, writing

from rq_compile.architectures.model import Model
from rq_compile.export.exported import Exported


@pytest.mark.parametrize("command", ["calibrate", "plan", "compile"])
def test_an_output_that_cannot_be_written(rq_compile: Run, model: Path, stages: Path, out: Path, command: str) -> None:
    refused(rq_compile(*writing(command, model, stages, out / "nothing"), "-q"), 2, "cannot write", "there is no folder")
    refused(rq_compile(*writing(command, model, stages, Path("/proc")), "-q"), 2, "cannot write /proc/model")
    (out / "model.json").mkdir()
    (out / "model.onnx").mkdir()
    refused(rq_compile(*writing(command, model, stages, out), "-q"), 2, "cannot write", "is a folder")
    assert names(out) == ["model.json", "model.onnx"]


def test_statistics_do_not_overwrite_the_model(rq_compile: Run, model: Path, stages: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    before = (copy / "model.safetensors").read_bytes()
    refused(rq_compile(*writing("calibrate", copy, stages, copy), "-q"), 2, "would overwrite", "model.safetensors", "weights")
    assert (copy / "model.safetensors").read_bytes() == before
    assert names(copy) == names(model)


def test_a_manifest_does_not_overwrite_that_of_another_engine(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    shutil.copy(stages / "model.json", out)
    before = (out / "model.json").read_bytes()
    result = rq_compile(*writing("compile", model, stages, out)[:-1], out / "model.plan", "--no-build", "-q")
    refused(result, 2, "would overwrite", "model.json, which is the manifest of model.onnx", "-o")
    assert (out / "model.json").read_bytes() == before
    (out / "model.json").write_bytes(before.replace(b'"target": "cpu"', b'"target": "tensorrt"', 1))
    refused(rq_compile(*writing("compile", model, stages, out), "-q"), 2, "which is the manifest of model.plan")


@contextmanager
def file_size_limited(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing fails as on a full disk, with another errno.

    Only during the command, since pytest's own output may be a file, too.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["calibrate", "plan", "compile"])
def test_a_full_disk_leaves_nothing(rq_compile: Run, model: Path, stages: Path, out: Path, command: str) -> None:
    with file_size_limited(1000):
        result = rq_compile(*writing(command, model, stages, out), "-q")
    refused(result, 1, "File too large", "free space")
    assert names(out) == []


def test_a_full_disk_keeps_what_was_there_and_what_was_done(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    for file in stages.glob("model.*"):
        shutil.copy(file, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with file_size_limited((stages / "model.onnx.data").stat().st_size - 1):
        result = rq_compile(*writing("compile", model, stages, out), "-q")
    refused(result, 1, "cannot write", "model.onnx.data", "free space")
    assert {path: path.read_bytes() for path in out.iterdir() if path in before} == before
    assert names(out)[:2] == [".model.onnx.data.journal", ".model.onnx.data.partial"]
    assert rq_compile(*writing("compile", model, stages, out), "-q").exit_code == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_compilation_leaves_nothing(
    model: Path,
    stages: Path,
    out: Path,
    tmp_path: Path,
    export_once: Callable[[Model], Exported],
    sent: signal.Signals,
    status: int,
) -> None:
    """The command is interrupted when half of the weights are written."""
    (tmp_path / "exported").write_bytes(pickle.dumps(export_once(Model.open(model))))
    # If the tests run in the background, SIGINT may be ignored, and Python would then leave it ignored.
    program = f"""
import pickle, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import rq_compile.targets.onnxruntime as target
target.export_graph = lambda _: pickle.load(open({str(tmp_path / "exported")!r}, "rb"))
def write_half(sections, file, progress, **options):
    file.write(bytes(1000))
    file.flush()
    print("half", flush=True)
    time.sleep(60)
target.write_weights = write_half
from rq_compile.cli.main import main
main({[str(argument) for argument in writing("compile", model, stages, out)]!r})
"""
    process = python("-c", program)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "half\n", process.stderr.read()
    assert len(names(out)) == 5
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in stderr
    assert names(out) == []


def test_another_process_writes_the_same_bytes(model: Path, stages: Path, out: Path) -> None:
    calibrate = ("calibrate", model, "--text", stages / "text.txt", "--sequence-length", 64, "-o", out / "calibration.json")
    plan = ("plan", out / "calibration.json", "--target", "batched", "--memory", 0.6, "-o", out / "plan.json")
    commands = [[*map(str, arguments)] for arguments in (calibrate, plan, writing("compile", model, stages, out))]
    # As many threads as conftest sets for this process: sums in a different order differ in their last bits.
    program = f"""
import torch
torch.set_num_threads(1)
from rq_compile.cli.main import main
for arguments in {commands!r}:
    main([*arguments, "-q"], standalone_mode=False)
"""
    process = python("-c", program)
    assert process.communicate() == ("", "")
    assert names(out) == [name for name in names(stages) if name != "text.txt"]
    for file in out.iterdir():
        assert file.read_bytes() == (stages / file.name).read_bytes(), file.name


def test_a_plan_in_another_folder_finds_the_statistics(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    (out / "plans").mkdir()
    plan = out / "plans" / "plan.json"
    assert rq_compile("plan", stages / "calibration.json", "--target", "batched", "-o", plan, "-q").exit_code == 0
    assert rq_compile(model, "--plan", plan, "-o", out / "m.onnx", "-q").exit_code == 0
    moved = Path(shutil.move(plan, out))
    refused(rq_compile(model, "--plan", moved, "-o", out / "m.onnx", "-q"), 2, "calibration.safetensors are missing")


def test_compiling_in_one_go(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    arguments = (model, "--text", stages / "text.txt", "--policy", "none", "--lowering", "stock", "-o", out / "m.onnx")
    result = rq_compile(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "any ONNX Runtime" in result.stdout
    assert "policy" in result.stdout
    assert names(out) == ["m.json", "m.onnx", "m.onnx.data", "m.tokenizer.json"]
    assert rq_compile("inspect", out / "m.onnx", "--verify").exit_code == 0
