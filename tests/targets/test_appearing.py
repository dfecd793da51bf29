"""A machine that stops while an engine's files get their names."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from command_line import Run, names, python, refused

from rq_compile.engine.appearing import list_of

# Stops the process as a power cut would, before the rename with this number.
STOPPED = """
import os, signal, sys
from rq_compile import file_systems
renamed, number, replace = [], int(sys.argv.pop(1)), os.replace
from pathlib import Path
plain = Path.replace
def stopping(self, target):
    if str(target).startswith(sys.argv[-1].removesuffix("model.onnx")):
        if len(renamed) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed.append(target)
    return plain(self, target)
Path.replace = stopping
from rq_compile.cli.main import main
main()
"""


def stop_at(number: int, model: Path, plan: Path, output: Path) -> None:
    process = python("-c", STOPPED, str(number), str(model), "--plan", str(plan), "-q", "-o", str(output))
    _, said = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, said


def test_the_next_compilation_knows_what_was_left(model: Path, stages: Path, out: Path, rq_compile: Run) -> None:
    output = out / "model.onnx"
    stop_at(2, model, stages / "plan.json", output)
    assert [name for name in names(out) if not name.startswith(".")] == ["model.onnx.data"]
    assert list_of(output).is_file()
    refused(rq_compile("generate", output, "--prompt", "a"), 2, "no such engine")
    result = rq_compile(model, "--plan", stages / "plan.json", "-o", output, "-q")
    assert result.exit_code == 0, result.stderr
    assert not list_of(output).exists()
    assert (out / "model.onnx.data").read_bytes() == (stages / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("command", ["generate", "bench", "inspect", "package"])
def test_new_weights_beside_an_old_manifest_are_no_engine(stages: Path, out: Path, rq_compile: Run, command: str) -> None:
    """The files may have the same sizes."""
    for file in stages.glob("model.*"):
        shutil.copy(file, out)
    list_of(out / "model.onnx").write_text('["model.onnx", "model.onnx.data", "model.json"]')
    options: dict[str, list[object]] = {"generate": ["--prompt", "a"], "package": ["--for", "edge", "-o", out / "edge"]}
    arguments = options.get(command, [])
    refused(rq_compile(command, out / "model.onnx", *arguments), 2, "is incomplete", "compile it again")


@pytest.mark.parametrize("content", ["", "{}", "[1, null]", "\xff", '["other.onnx.data"]'])
def test_a_list_that_says_nothing(stages: Path, model: Path, out: Path, rq_compile: Run, content: str) -> None:
    output = out / "model.onnx"
    list_of(output).write_bytes(os.fsencode(content))
    (out / "model.onnx.data").write_bytes(b"somebody's")
    refused(rq_compile(model, "--plan", stages / "plan.json", "-o", output), 2, "model.onnx.data", "did not write")
    assert (out / "model.onnx.data").read_bytes() == b"somebody's"
