"""An interrupted calibration continues after its last finished layer, with the same result as an uninterrupted one."""

import errno
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from calibrated import LENGTH, TEXTS
from command_line import names, python
from transformers import PretrainedConfig

from rq_compile.architectures.model import Model
from rq_compile.calibration import calibrate as module
from rq_compile.calibration import unfinished as keeping
from rq_compile.calibration.memory import Way
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.unfinished import unfinished
from rq_compile.errors import UserError

Calibrated = tuple[Calibration, dict[str, np.ndarray]]


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A tiny checkpoint of four layers, or of two encoder and two decoder layers."""

    def build(family: str) -> Path:
        def deeper(config: Callable[[], PretrainedConfig] = tiny.CONFIGS[family]) -> PretrainedConfig:
            made = config()
            if not made.is_encoder_decoder:
                made.update({"num_hidden_layers": 4})
                if getattr(made, "layer_types", None):
                    made.layer_types = (made.layer_types * 2)[:4]
            return made

        monkeypatch.setitem(tiny.CONFIGS, family, deeper)
        return tiny.build(family, tmp_path / family)

    return build


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calibrated]:
    """``calibrated(model, output)`` layer by layer; ``die`` is called with the number of a layer before it is measured."""
    measure_layer = module.measure_layer
    monkeypatch.setattr(module, "choose_way", lambda *_, **__: Way(False, True, "layer by layer"))

    def calibrated(
        model: Path,
        output: Path,
        die: Callable[[int], None] = lambda number: None,
        said: list[str] | None = None,
        fresh: bool = False,
        **options: Any,
    ) -> Calibrated:
        measured = [0]

        def measure(*arguments: Any, **given: Any) -> Any:
            die(measured[0])
            measured[0] += 1
            return measure_layer(*arguments, **given)

        monkeypatch.setattr(module, "measure_layer", measure)
        given: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "progress": lambda done, total: None} | options
        say = (said if said is not None else []).append
        with unfinished(output, fresh=fresh, say=say) as kept:
            calibration, statistics = module.calibrate(Model.open(model), TEXTS, kept=kept, remark=say, **given)
            found = calibration, {name: np.array(moment) for name, moment in statistics.items()}
        if said is not None:
            said.append(f"measured {measured[0]}")
        return found

    return calibrated


def interrupt_at(layer: int) -> Callable[[int], None]:
    def die(number: int) -> None:
        if number == layer:
            raise KeyboardInterrupt

    return die


def assert_same(found: Calibrated, expected: Calibrated) -> None:
    assert found[0].model_dump_json() == expected[0].model_dump_json()
    assert found[1].keys() == expected[1].keys()
    for name, moment in expected[1].items():
        np.testing.assert_array_equal(found[1][name], moment)


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "switch_transformers"])
def test_goes_on_behind_the_last_finished_layer(
    deep: Callable[[str], Path], calibrated: Callable[..., Calibrated], tmp_path: Path, family: str
) -> None:
    """At any layer: after a dense one, between encoder and decoder, and in the last one; and interrupted twice."""
    model, output = deep(family), tmp_path / "c.json"
    expected = calibrated(model, output)
    layers = len(expected[0].layers)
    for layer in range(layers):
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, output, interrupt_at(layer), said)
        assert any("continues from there, or starts over with --fresh" in text for text in said) == (layer > 0)
        said.clear()
        assert_same(calibrated(model, output, said=said), expected)
        assert f"measured {layers - layer}" in said
        assert any(text.startswith("continuing after") for text in said) == (layer > 0)
        assert not list(tmp_path.glob(".c.json*"))
    for again in range(layers - 1):
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, output, interrupt_at(1), said := [])
        assert again == 0 or any(text.startswith("continuing after") for text in said)
    assert_same(calibrated(model, output), expected)


def test_what_was_changed_meanwhile_is_not_taken_up(
    deep: Callable[[str], Path], calibrated: Callable[..., Calibrated], tmp_path: Path
) -> None:
    model, output, partial = deep("olmoe"), tmp_path / "c.json", tmp_path / ".c.json.partial"
    expected = calibrated(model, output)

    def again(change: Callable[[], object], words: str, **options: Any) -> Calibrated:
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, output, interrupt_at(2))
        change()
        said: list[str] = []
        found = calibrated(model, output, said=said, **options)
        assert any(words in text for text in said), said
        return found

    for name in ("0.json", "1.safetensors", "states.1.pt"):
        spoiled = partial / name
        assert_same(again(functools.partial(flip, spoiled), "differ from what was written; starting over"), expected)
        assert_same(again(spoiled.unlink, "differ from what was written; starting over"), expected)
    journal = partial / "journal.jsonl"
    # A truncated line is a layer that was not finished; it is written again.
    assert_same(again(lambda: journal.write_text(journal.read_text()[:-20]), "starting over"), expected)
    other = again(lambda: None, "is of another calibration (other texts, options, model or version); starting over", batch_size=3)
    assert other[0].batch_size == 3
    assert_same(again(lambda: None, "measured 4", fresh=True), expected)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_full_disk_costs_the_layer_alone(
    deep: Callable[[str], Path], calibrated: Callable[..., Calibrated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = deep("olmoe"), tmp_path / "c.json"
    expected, save, saved = calibrated(model, output), keeping.torch.save, [0]

    def full(*arguments: Any) -> None:
        saved[0] += 1
        if saved[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments)

    monkeypatch.setattr(keeping.torch, "save", full)
    with pytest.raises(UserError, match=r"cannot keep the measurements of model\.layers\.2.*: No space left on device; free"):
        calibrated(model, output)
    said: list[str] = []
    assert_same(calibrated(model, output, said=said), expected)
    assert "measured 2" in said


def test_two_at_once_are_refused(deep: Callable[[str], Path], calibrated: Callable[..., Calibrated], tmp_path: Path) -> None:
    model, output = deep("olmoe"), tmp_path / "c.json"

    def another(number: int) -> None:
        if number == 1:
            calibrated(model, output)

    with pytest.raises(UserError, match=r"another rq-compile writes .*\.c\.json\.partial; wait for it"):
        calibrated(model, output, another)


KILLED = """
import os, signal, sys
from rq_compile.calibration import calibrate as module
measure, measured = module.measure_layer, [0]

def measure_layer(*arguments, **given):
    measured[0] += 1
    if measured[0] == int(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    print("measuring", file=sys.stderr)
    return measure(*arguments, **given)

module.measure_layer = measure_layer
module.choose_way = lambda *_, **__: module.Way(False, True, "layer by layer")
from rq_compile.cli.main import main
main(sys.argv[3:])
"""


@pytest.mark.parametrize("death", ["SIGKILL", "SIGTERM"])
def test_on_the_command_line(deep: Callable[[str], Path], tmp_path: Path, death: str) -> None:
    model = deep("olmoe")
    (tmp_path / "text.txt").write_text(TEXTS["first.txt"])
    folder = tmp_path / "out"
    folder.mkdir()

    def run(output: str, layer: int, *options: str) -> tuple[int, str]:
        given = ["calibrate", model, "--text", tmp_path / "text.txt", "--sequence-length", 8, "-o", folder / output, *options]
        process = python("-c", KILLED, str(layer), death, *map(str, given))
        _, error = process.communicate()
        return process.returncode, error

    assert run("whole.json", -1)[0] == 0
    status, error = run("c.json", 3)
    assert status == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143}[death], error
    assert (".c.json.partial holds the finished part" in error) == (death != "SIGKILL")
    assert (folder / ".c.json.partial").is_dir()
    status, error = run("c.json", -1)
    assert status == 0, error
    assert error.count("measuring") == 2
    assert "continuing after model.layers.1.mlp.experts, which is finished" in error
    assert names(folder) == ["c.json", "c.safetensors", "whole.json", "whole.safetensors"]
    assert (folder / "c.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()
    assert (folder / "c.json").read_text() == (folder / "whole.json").read_text().replace("whole.safe", "c.safe")
