"""Shared by the tests of the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import rq_compile as package
from rq_compile.cli.main import main

Run = Callable[..., Result]
PACKAGED_IN = Path(package.__file__).parent.parent
SAMPLE_TEXTS = Path(__file__).parents[2] / "samples" / "text"


def run_command(*arguments: object) -> Result:
    """``rq-compile`` in this process; ``Result`` has stdout, stderr and exit_code."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def python(*arguments: str, **kwargs: Any) -> subprocess.Popen:
    """A separate Python process that finds this package, whether it is installed or not."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGED_IN)}
    command = [sys.executable, *safe_path(arguments[0]), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def safe_path(first: str) -> list[str]:
    """Options that prevent the working folder, often the source tree without libraries, from coming before the package."""
    return ["-P"] if first in ("-c", "-m") else []


def refused(result: Result, status: int, *words: object) -> None:
    """Check that stderr is one sentence that contains all ``words``, and that stdout is empty."""
    assert result.exit_code == status, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert str(word) in result.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def writing(command: str, model: Path, stages: Path, folder: Path) -> list[object]:
    """The arguments with which a command writes into ``folder``."""
    return {
        "calibrate": ["calibrate", model, "--text", stages / "text.txt", "-o", folder / "model.json"],
        "plan": ["plan", stages / "calibration.json", "-o", folder / "model.json"],
        "compile": [model, "--plan", stages / "plan.json", "-o", folder / "model.onnx"],
    }[command]
