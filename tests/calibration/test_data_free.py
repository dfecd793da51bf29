"""The remarks of a calibration without text, and of one with too little text."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calibrated import TEXTS
from calibrated import run as calibrated
from command_line import refused
from command_line import run_command as run

from rq_compile.architectures.model import Model
from rq_compile.calibration.coverage import ENOUGH, few_tokens
from rq_compile.calibration.data_free import data_free
from rq_compile.calibration.schema import Calibration
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.quantization.quantizer import stored

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_errors_are_those_of_the_weights(tiny_checkpoint: Tiny, family: str) -> None:
    model = Model.open(tiny_checkpoint(family))
    told: list[tuple[int, int]] = []
    found = data_free(model, progress=lambda *both: told.append(both))
    experts = sum(layer.geometry.experts for layer in model.layers)
    assert told == [(number, experts) for number in range(1, experts + 1)]
    assert (found.data_free, found.measured_tokens, found.quantizer, found.statistics) == (True, 0, "nearest", None)
    for layer, described in zip(model.layers, found.layers, strict=True):
        count = layer.geometry.experts
        assert described.load == [layer.geometry.top_k] * count
        assert described.tokens == count
        for expert in (0, count - 1):
            weights = model.expert(layer, expert)
            for format in ("bf16", "int8", "int4"):
                expected = sum(
                    float(((stored(matrix, format).astype(np.float64) - matrix.astype(np.float64)) ** 2).sum())
                    / float((matrix.astype(np.float64) ** 2).sum())
                    for matrix in (weights.up, weights.down)
                )
                np.testing.assert_allclose(described.error[format][expert], expected / count, rtol=1e-4)


def test_its_plan_says_so(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """The remark is in the plan, and wherever the plan's remarks are shown."""
    assert run("calibrate", tiny_checkpoint("olmoe"), "--data-free", "-o", tmp_path / "c.json").exit_code == 0
    assert read_document(Calibration, tmp_path / "c.json").data_free
    assert "without text: loads are assumed to be uniform" in run("inspect", tmp_path / "c.json").stdout
    assert run("plan", tmp_path / "c.json", "--memory", "0.4", "-o", tmp_path / "plan.json").exit_code == 0
    plan = read_document(Plan, tmp_path / "plan.json")
    assert plan.remarks[0].startswith("No text was run (calibrate --data-free)")
    assert "No text was run" in run("inspect", tmp_path / "plan.json").stdout
    result = run("merge", tmp_path / "c.json", tmp_path / "plan.json", "-o", tmp_path / "m.json")
    refused(result, 2, "plan.json is a file of kind plan")


def test_plan_of_a_checkpoint_is_that_of_its_data_free_calibration(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model = tiny_checkpoint("olmoe")
    assert run("calibrate", model, "--data-free", "-o", tmp_path / "c.json").exit_code == 0
    assert run("plan", tmp_path / "c.json", "--memory", "0.4", "-o", tmp_path / "two.json").exit_code == 0
    assert run("plan", model, "--data-free", "--memory", "0.4", "-o", tmp_path / "one.json").exit_code == 0
    one, two = (read_document(Plan, tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one == two.model_copy(update={"calibration_sha256": None})
    assert "No text was run" in run("inspect", tmp_path / "one.json").stdout


def test_plan_refuses_what_it_cannot_plan(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model = tiny_checkpoint("olmoe")
    refused(run("plan", model, "-o", tmp_path / "p.json"), 2, f"{model} is a directory", "--data-free")
    (tmp_path / "c.json").write_text("{}")
    refused(run("plan", tmp_path / "c.json", "--data-free", "-o", tmp_path / "p.json"), 2, "c.json is not a directory")
    refused(run("plan", tmp_path / "gone", "--data-free", "-o", tmp_path / "p.json"), 2, "gone is not a directory")
    (tmp_path / "empty").mkdir()
    refused(run("plan", tmp_path / "empty", "--data-free", "-o", tmp_path / "p.json"), 2, "empty")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "a.txt"], "--text"),
        (["--quantizer", "gptq"], "--quantizer"),
        (["--sequence-length", "8"], "--sequence-length"),
    ],
)
def test_refuses_options_of_a_run(tiny_checkpoint: Tiny, tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "a.txt").write_text(TEXTS["first.txt"])
    options = [str(tmp_path / option) if option == "a.txt" else option for option in options]
    result = run("calibrate", tiny_checkpoint("olmoe"), "--data-free", *options, "-o", tmp_path / "c.json")
    refused(result, 2, f"{said} has no effect with --data-free, which uses no text")
    assert not (tmp_path / "c.json").exists()


def test_experts_with_few_tokens_are_named(tiny_checkpoint: Tiny) -> None:
    calibration = calibrated(Model.open(tiny_checkpoint("olmoe")))
    remark = few_tokens(calibration)
    assert remark is not None
    assert "16 of 16 experts saw fewer than 256 tokens" in remark
    fewest, layer, expert = min((load, layer.index, e) for layer in calibration.layers for e, load in enumerate(layer.load))
    assert f"(expert {expert} of layer {layer} with {fewest}," in remark
    enough = [layer.model_copy(update={"load": [ENOUGH] * 8}) for layer in calibration.layers]
    assert few_tokens(calibration.model_copy(update={"layers": enough})) is None
