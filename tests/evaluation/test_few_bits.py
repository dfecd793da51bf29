"""Experts in 3 and 2 bits, from calibration to report: engines compute what transformers does with the same rounded weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refused
from command_line import run_command as run
from plans import tokens

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.engine.manifest import Manifest
from rq_compile.export.exported import Exported
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.quantization.quantizer import stored
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference

FORMATS = "int8,int4,int3,int2"


@pytest.fixture(scope="module")
def folder(
    stages: Path,
    tiny_checkpoint: Callable[[str], Path],
    export_once: Callable[[Model], Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """calibration.json and plan.json of the tiny OLMoE, with experts in every format that weights are rounded to."""
    made = tmp_path_factory.mktemp("few_bits")
    calibration = made / "calibration.json"
    text = ("--text", stages / "text.txt", "--sequence-length", 64)
    for arguments in (
        ("calibrate", tiny_checkpoint("olmoe"), *text, "--formats", FORMATS, "-o", calibration),
        ("plan", calibration, "--policy", "random", "--memory", 0.13, "-o", made / "plan.json"),
    ):
        result = run(*arguments, "-q")
        assert result.exit_code == 0, result.stderr
    return made


def rounded(model: Model, plan: Plan, statistics: Statistics) -> Reference:
    """The transformers model with the values that the weights of ``plan`` have."""
    changed = load_model(model)
    for layer in plan.layers:
        module: Any = changed.get_submodule(layer.name)
        for slot in layer.slots:
            moments = statistics.input_moment(layer.name), statistics.intermediate_moment(layer.name, slot.expert)
            for weight, moment in zip((module.gate_up_proj[slot.expert], module.down_proj[slot.expert]), moments, strict=True):
                weight.data.copy_(torch.from_numpy(stored(weight.data.numpy(), slot.format, moment)))
    return Reference(changed)


def test_every_format_is_measured_and_planned(folder: Path) -> None:
    calibration, plan = read_document(Calibration, folder / "calibration.json"), read_document(Plan, folder / "plan.json")
    for layer in calibration.layers:
        assert [format for format in layer.error if format.startswith("int")] == FORMATS.split(",")
        total = [sum(errors) for format, errors in layer.error.items() if format.startswith("int")]
        assert total == sorted(total)
    assert {slot.format for layer in plan.layers for slot in layer.slots} >= {"int2", "int3"}


@pytest.mark.parametrize("lowering", ["native", "stock", "batched"])
def test_an_engine_computes_what_transformers_does_with_the_same_weights(
    folder: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, lowering: str
) -> None:
    checkpoint, plan = tiny_checkpoint("olmoe"), read_document(Plan, folder / "plan.json")
    compiled = run(checkpoint, "--plan", folder / "plan.json", "--lowering", lowering, "-o", tmp_path / "model.onnx")
    assert compiled.exit_code == 0, compiled.stderr
    assert plan.statistics is not None
    statistics = Statistics.beside(folder, plan.statistics)
    reference, engine = rounded(Model.open(checkpoint), plan, statistics), Engine.load(tmp_path / "model.onnx", threads=1)
    for batch, length in ((1, 1), (3, 20)):
        ids = tokens(batch, length)
        np.testing.assert_allclose(engine.logits(ids), reference.logits(ids), atol=1e-4, rtol=0)
    prompt = tokens(7).tolist()
    assert list(engine.generate(prompt, 12, stop=False)) == list(reference.generate(prompt, 12, stop=False))

    manifest = read_document(Manifest, tmp_path / "model.json")
    counts = {format: sum(slot.format == format for layer in plan.layers for slot in layer.slots) for format in ("int3", "int2")}
    for format, count in counts.items():
        assert manifest.replaced.get(f"{format} slots held as int4", 0) == (0 if lowering == "native" else count)
    assert ("held as int4: the experts take" in compiled.stderr) == (lowering != "native")
    if lowering != "native":
        assert manifest.expert_bytes > plan.bytes_after


def test_the_commands_read_such_an_engine(
    folder: Path, stages: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = tmp_path / "model.onnx"
    assert run(tiny_checkpoint("olmoe"), "--plan", folder / "plan.json", "--activation-bits", 8, "-o", engine).exit_code == 0
    (tmp_path / "held.txt").write_text((stages / "text.txt").read_text()[:600])
    held = ("--reference", tiny_checkpoint("olmoe"), "--text", tmp_path / "held.txt", "--sequence-length", 64)
    for arguments, words in (
        (("inspect", folder / "calibration.json"), "int2"),
        (("inspect", folder / "plan.json"), "int3:"),
        (("inspect", engine), "int2"),
        (("evaluate", engine, *held), "perplexity"),
        (("generate", engine, "--prompt", "abc", "--max-tokens", 4), ""),
        (("bench", engine, "--rounds", 1), ""),
        (("report", engine, "-o", tmp_path / "report.html"), ""),
        (("package", engine, "--for", "edge", "-o", tmp_path / "edge"), ""),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        assert words in result.stdout
    assert 'class="bits2"' in (tmp_path / "report.html").read_text()


def test_formats_are_checked_before_the_work(tiny_checkpoint: Callable[[str], Path], stages: Path, tmp_path: Path) -> None:
    model, text = tiny_checkpoint("olmoe"), stages / "text.txt"
    for formats, said in (
        ("int5", "'int5' cannot be measured; write some of int8, int4, int3, int2, constant, separated by commas"),
        ("int8,", "'' cannot be measured"),
        ("int8,bf16", "'bf16' cannot be measured"),
        ("mxfp4", "'mxfp4' cannot be measured"),
    ):
        refused(run("calibrate", model, "--text", text, "--formats", formats, "-o", tmp_path / "c.json"), 2, said)
    assert not list(tmp_path.iterdir())


def test_a_plan_without_text_has_few_bits_too(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    calibration = tmp_path / "c.json"
    asked = ("calibrate", tiny_checkpoint("olmoe"), "--data-free", "--formats", "int2, int8", "-o", calibration)
    assert run(*asked).exit_code == 0
    assert list(read_document(Calibration, calibration).layers[0].error)[-2:] == ["int8", "int2"]


def test_an_estimate_grows_with_the_formats(tiny_checkpoint: Callable[[str], Path], stages: Path, tmp_path: Path) -> None:
    sizes = []
    for formats in ("int8", "int8,int4", FORMATS):
        arguments = (
            "calibrate",
            tiny_checkpoint("olmoe"),
            "--text",
            stages / "text.txt",
            "--formats",
            formats,
            "--dry-run",
            "--json",
        )
        result = run(*arguments, "-o", tmp_path / "c.json")
        assert result.exit_code == 0, result.stderr
        import json

        sizes.append(json.loads(result.stdout)["outputs"]["c.json"])
    assert sizes == sorted(set(sizes))
