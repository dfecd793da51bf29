"""``calibrate --memory-limit`` and ``--device``: the memory used, the remarks and the errors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from command_line import refused
from safetensors.numpy import load_file

from rq_compile.architectures.model import Model
from rq_compile.calibration import memory

Run = Callable[..., Result]


@pytest.fixture
def calibrate(stages: Path, model: Path, out: Path, rq_compile: Run) -> Run:
    text = ["--text", stages / "text.txt", "--sequence-length", 64]
    return lambda *more: rq_compile("calibrate", model, *text, "-o", out / "c.json", *more)


def test_the_note_says_which_way_and_the_files_are_the_same(
    calibrate: Run, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "LOADING", 1e9)
        result = calibrate("--memory-limit", "16G")
    assert result.exit_code == 0, result.stderr
    assert "the model runs layer by layer: as a whole it would take" in result.stderr
    streamed, whole = load_file(out / "c.safetensors"), load_file(stages / "calibration.safetensors")
    assert streamed.keys() == whole.keys()
    for name, moment in whole.items():
        np.testing.assert_allclose(streamed[name], moment, rtol=0, atol=1e-5 * np.abs(moment).max())
    result = calibrate("--memory-limit", "16G")
    assert "the model runs as a whole, in about " in result.stderr
    assert (out / "c.json").read_bytes() == (stages / "calibration.json").read_bytes().replace(b"calibration.safe", b"c.safe")
    assert calibrate("--memory-limit", "16G", "-q").stderr == ""


def test_refuses_a_limit_that_no_layer_fits_into(calibrate: Run, out: Path) -> None:
    refused(calibrate("--memory-limit", "64M", "-q"), 2, "--memory-limit is 64 MiB, but a single layer of", "give that much")
    assert list(out.iterdir()) == []


def test_refuses_a_device_that_is_not_there(calibrate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in ([], ["--dry-run"]):
        refused(calibrate("--device", "cuda", "-q", *more), 2, "--device cuda asks for a GPU", "use --device cpu")


@pytest.mark.parametrize(("option", "value"), [("--memory-limit", "4G"), ("--device", "cuda")])
def test_refuses_them_where_nothing_is_run(
    stages: Path, model: Path, out: Path, rq_compile: Run, option: str, value: str
) -> None:
    given = ["--from-loads", "loads.json", "--calibration", stages / "calibration.json", "-o", out / "c.json"]
    refused(rq_compile("calibrate", model, *given, option, value), 2, f"{option} has no effect with --from-loads")


def test_more_text_asks_for_more_disk_not_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LOADING", 1e9)
    opened = Model.open(model)
    limit = memory.used_memory() + memory.PROGRAM + 32 * 2**20
    ways = [memory.choose_way(opened, opened.layers, rows=rows, limit=limit, device="cpu") for rows in (10_000, 10_000_000)]
    assert [way.states_in_memory for way in ways] == [True, False]
    assert ways[1].memory <= ways[0].memory
