"""Names and texts that are not plain ASCII, in locales that are not UTF-8, and options before MODEL."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Run, names, refused

import rq_compile as package

NOT_UTF8 = os.fsdecode(b"caf\xe9")
LOCALES = {
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "C": {"LC_ALL": "C"},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
}


def in_locale(locale: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parent.parent), **LOCALES[locale]}
    command = [sys.executable, "-P", "-m", "rq_compile", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


@pytest.fixture
def copied(stages: Path, out: Path) -> Path:
    """The stages in a folder with a name that is not ASCII."""
    return Path(shutil.copytree(stages, out / "Köln"))


@pytest.mark.parametrize("locale", LOCALES)
def test_names_and_texts_in_every_locale(copied: Path, locale: str) -> None:
    planned = in_locale(locale, "plan", copied / "calibration.json", "-o", copied / "größe.json")
    assert planned.returncode == 0, planned.stderr
    assert f"wrote {copied / 'größe.json'}".encode() in planned.stderr
    shown = in_locale(locale, "inspect", copied / "größe.json")
    assert shown.returncode == 0, shown.stderr
    shown.stdout.decode()
    missing = in_locale(locale, "inspect", copied / "größer.json")
    assert missing.returncode == 2
    assert "größer.json".encode() in missing.stderr


def test_an_engine_and_a_text_in_an_ascii_locale(copied: Path) -> None:
    for file in copied.glob("model.*"):
        shutil.copy(file, copied / file.name.replace("model", "modèle"))
    content = json.loads((copied / "model.json").read_text())
    for entry in (content["graph"], content["tokenizer"]):
        entry["name"] = entry["name"].replace("model", "modèle")
    (copied / "modèle.json").write_text(json.dumps(content))
    ran = in_locale("ASCII", "generate", copied / "modèle.onnx", "--prompt", "a", "--max-tokens", 2, "--json")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["tokens"]) == 2


def test_models_and_texts_whose_names_are_not_utf8(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    checkpoint, text = out / NOT_UTF8, out / f"{NOT_UTF8}.txt"
    try:
        shutil.copytree(model, checkpoint)
    except OSError:
        pytest.skip("this file system holds only names that are UTF-8")
    shutil.copy(stages / "text.txt", text)
    calibrated = ["--sequence-length", "64", "-o", out / "calibration.json"]
    for arguments in (
        ["calibrate", checkpoint, "--text", text, *calibrated],
        ["plan", out / "calibration.json", "-o", out / "plan.json"],
        [checkpoint, "--plan", out / "plan.json", "-o", out / "model.onnx"],
        ["evaluate", out / "model.onnx", "--reference", checkpoint, "--text", text, "--json"],
        ["bench", out / "model.onnx", "--prompt-tokens", "2", "--new-tokens", "1", "--rounds", "1", "--json"],
    ):
        result = rq_compile(*arguments)
        assert result.exit_code == 0, result.stderr
    written = json.loads((out / "calibration.json").read_text())
    assert (written["model"], written["texts"][0]["name"]) == (r"caf\xe9", r"caf\xe9.txt")
    assert json.loads((out / "plan.json").read_text())["model"] == r"caf\xe9"


def test_an_engine_in_a_folder_whose_name_is_not_utf8(rq_compile: Run, stages: Path, out: Path) -> None:
    try:
        folder = Path(shutil.copytree(stages, out / NOT_UTF8))
    except OSError:
        pytest.skip("this file system holds only names that are UTF-8")
    ran = rq_compile("generate", folder / "model.onnx", "--prompt", "a", "--max-tokens", 2, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert len(json.loads(ran.stdout)["tokens"]) == 2
    packed = rq_compile("package", folder / "model.onnx", "--for", "edge", "-o", folder / "edge", "--json")
    assert packed.exit_code == 0, packed.stderr
    assert json.loads(packed.stdout)["folder"].endswith(r"caf\xe9/edge")


@pytest.mark.parametrize("command", ["calibrate", "plan", "compile"])
def test_outputs_whose_names_are_not_utf8_are_refused_before_the_work(
    rq_compile: Run, model: Path, stages: Path, out: Path, command: str
) -> None:
    arguments: dict[str, list[object]] = {
        "calibrate": ["calibrate", model, "--text", stages / "text.txt", "-o", out / f"{NOT_UTF8}.json"],
        "plan": ["plan", stages / "calibration.json", "-o", out / f"{NOT_UTF8}.json"],
        "compile": [model, "--text", stages / "text.txt", "-o", out / f"{NOT_UTF8}.onnx"],
    }
    refused(rq_compile(*arguments[command]), 2, r"cannot write caf\xe9.", "not UTF-8", "choose another output with -o")
    assert names(out) == []


# The implicit command


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_options_may_come_before_model(rq_compile: Run, model: Path, stages: Path, out: Path, place: int) -> None:
    options = [["--plan", str(stages / "plan.json")], ["-o", str(out / "model.onnx")], ["-q"]]
    arguments = [argument for option in options[:place] for argument in option]
    arguments += [str(model)] + [argument for option in options[place:] for argument in option]
    result = rq_compile(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "model.onnx" in names(out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-q", "calibrate", "x"], ["-q is placed before the command calibrate; write rq-compile calibrate ... -q"]),
        (["--memory", "1", "plan", "c.json"], ["--memory is placed before the command plan"]),
        (["--plan", "p.json", "modle", "-o", "x.onnx"], ["no such command or model directory: modle"]),
        (["--plan", "p.json", "-o", "x.onnx"], ["missing argument 'MODEL'"]),
        (["--plam", "p.json", "model", "-o", "x.onnx"], ["--plam", "--plan"]),
        (["--plan"], ["--plan"]),
    ],
)
def test_options_before_something_else(rq_compile: Run, arguments: list[str], words: list[str]) -> None:
    refused(rq_compile(*arguments), 2, *words)


def test_help_and_version_are_of_the_whole_command(rq_compile: Run) -> None:
    assert "Commands:" in rq_compile("--help").stdout
    assert "Commands:" in rq_compile("-h").stdout
    assert package.__version__ in rq_compile("--version").stdout
    assert "--plan" in rq_compile("--plan", "p.json", "--help").stdout
