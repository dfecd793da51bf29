"""The guard of outputs: files that a command reads, and files that are not ours, are never overwritten."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, names, refused

from rq_compile.errors import UserError
from rq_compile.outputs import REPORT, check_outputs, document
from rq_compile.targets.engine_outputs import onnx_outputs

pytestmark = pytest.mark.quick

Alias = Callable[[Path], Path]


@pytest.fixture
def files(stages: Path, model: Path, out: Path) -> Path:
    """Copies of all stages, and of the model in ``model/``, to be overwritten."""
    shutil.copytree(stages, out, dirs_exist_ok=True)
    shutil.copytree(model, out / "model")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def symlink(path: Path) -> Path:
    (path.parent / "soft").symlink_to(path.name)
    return path.parent / "soft"


def hard_link(path: Path) -> Path:
    os.link(path, path.parent / "hard")
    return path.parent / "hard"


def relative(path: Path) -> Path:
    return path.parent / "model" / ".." / path.name


ALIASES: list[Alias] = [lambda path: path, symlink, hard_link, relative]


@pytest.mark.parametrize("alias", ALIASES, ids=["itself", "symlink", "hard link", "relative"])
@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["plan", "calibration.json"], "calibration.json"),
        (["calibrate", "model", "--text", "text.txt"], "text.txt"),
        (["calibrate", "model", "--text", "calibration.json"], "calibration.json"),
        (["calibrate", "model", "--from-loads", "calibration.json", "--calibration", "calibration.json"], "calibration.json"),
        (["replan", "plan.json", "--loads", "calibration.json"], "calibration.json"),
        (["replan", "plan.json", "--loads", "calibration.json"], "plan.json"),
        (["report", "model.onnx"], "model.json"),
    ],
)
def test_an_output_is_no_input(
    rq_compile: Run, files: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], output: str, alias: Alias
) -> None:
    monkeypatch.chdir(files)
    place = alias(Path(output).resolve())
    before = contents(files)
    refused(rq_compile(*arguments, "-o", place), 2, "would overwrite", place, "choose another output with -o")
    assert contents(files) == before


@pytest.mark.parametrize("output", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("command", [["calibrate", "model", "--text", "text.txt"], ["plan", "calibration.json"]])
def test_a_file_of_the_model(
    rq_compile: Run, files: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], output: str
) -> None:
    monkeypatch.chdir(files)
    (files / "model" / "generation_config.json").write_text("{}")
    before = contents(files)
    refused(rq_compile(*command, "-o", f"model/{output}"), 2, output)
    assert contents(files) == before


@pytest.mark.parametrize(
    ("taken", "output", "words"),
    [
        ("model.tokenizer.json", "model.onnx", ["would overwrite", "model.tokenizer.json", "which rq-compile did not write"]),
        ("model.onnx.data", "model.onnx", ["would overwrite", "model.onnx.data"]),
        ("model.onnx", "model.onnx", ["would overwrite", "model.onnx"]),
        ("model.json", "model.onnx", ["would overwrite", "model.json", "which rq-compile did not write"]),
        ("model.model.safetensors", "model.onnx", ["would overwrite", "model.model.safetensors", "holds weights of a model"]),
        ("model.network.onnx", "model.plan", ["would overwrite", "model.network.onnx"]),
        ("model.build.sh", "model.plan", ["would overwrite", "model.build.sh"]),
    ],
)
def test_an_engine_of_somebody_else(
    rq_compile: Run, stages: Path, model: Path, out: Path, taken: str, output: str, words: list[str]
) -> None:
    (out / taken).write_text("not ours")
    options = ["--no-build"] if output.endswith(".plan") else ["--link-weights"]
    refused(rq_compile(model, "--plan", stages / "plan.json", "-o", out / output, *options), 2, *words)
    assert contents(out) == {taken: b"not ours"}


def test_a_text_that_is_named_as_a_file_of_the_engine(rq_compile: Run, files: Path) -> None:
    before = contents(files)
    text = files / "model.tokenizer.json"
    refused(rq_compile(files / "model", "--text", text, "-o", files / "model.onnx"), 2, "model.tokenizer.json, which this")
    assert contents(files) == before


def test_earlier_outputs_of_the_same_kind_are_replaced(rq_compile: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    shutil.copy("plan.json", "old.json")
    for arguments in (
        ["plan", "calibration.json", "-o", "plan.json"],
        ["replan", "old.json", "--loads", "calibration.json", "-o", "plan.json"],
        ["report", "model.onnx", "-o", "page.html"],
        ["report", "model.onnx", "-o", "page.html"],
        ["package", "model.onnx", "--for", "edge", "-o", "edge.tar.gz"],
        ["package", "model.onnx", "--for", "edge", "-o", "edge.tar.gz"],
        ["package", "model.onnx", "--for", "edge", "-o", "edge.zip"],
        ["package", "model.onnx", "--for", "edge", "-o", "edge.zip"],
    ):
        result = rq_compile(*arguments, "-q")
        assert result.exit_code == 0, result.stderr


def test_reports_and_packages_replace_nothing_else(rq_compile: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    Path("page.html").write_text("<!doctype html><p>mine")
    Path("mine.zip").write_bytes(b"PK not really")
    with tarfile.open("mine.tar.gz", "w:gz") as archive:
        archive.add("text.txt")
    before = contents(files)
    refused(rq_compile("report", "model.onnx", "-o", "page.html"), 2, "report would overwrite page.html")
    for name in ("mine.zip", "mine.tar.gz"):
        refused(rq_compile("package", "model.onnx", "--for", "edge", "-o", name), 2, f"package would overwrite {name}")
    assert contents(files) == before


@pytest.mark.parametrize("command", [["plan", "calibration.json"], ["replan", "plan.json", "--loads", "calibration.json"]])
def test_what_is_no_regular_file(rq_compile: Run, files: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """As root, a rename would replace /dev/null."""
    monkeypatch.chdir(files)
    os.mkfifo("pipe")
    refused(rq_compile(*command, "-o", "pipe"), 2, "cannot write pipe: it is not a regular file")
    assert Path("pipe").is_fifo()


def test_names_that_no_document_or_file_system_can_hold(rq_compile: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    refused(rq_compile("plan", "calibration.json", "-o", "\udcff.json"), 2, r"cannot write \xff.json", "UTF-8")
    refused(rq_compile("plan", "calibration.json", "-o", f"{'ü' * 125}.json"), 2, "its name has 255 bytes, but only")
    result = rq_compile("plan", "calibration.json", "-o", f"{'ü' * 110}.json", "-q")
    assert result.exit_code == 0, result.stderr


def test_the_guard_alone(out: Path) -> None:
    (out / "plan.json").write_text('{"kind": "plan"}')
    (out / "calibration.json").write_text('{"kind": "calibration"}')
    check_outputs({out / "plan.json": document("plan"), out / "new.html": REPORT}, [out / "calibration.json", out / "none"])
    check_outputs(onnx_outputs(out / "new.onnx", out))
    with pytest.raises(UserError, match=r"the plan would overwrite .*calibration.json, which is a calibration; choose"):
        check_outputs({out / "calibration.json": document("plan")})
    with pytest.raises(UserError, match=r"the engine's manifest would overwrite .*plan.json, which is a plan; choose"):
        check_outputs(onnx_outputs(out / "plan.onnx", out))
    (out / "dangling.json").symlink_to("nowhere")
    check_outputs({out / "dangling.json": document("plan")})
    assert names(out) == ["calibration.json", "dangling.json", "plan.json"]
