"""The estimates of a dry run, compared with the files that are then written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import tiny
import torch
from command_line import Run, names, refused
from joined_matrices import behind_others

from rq_compile import estimates
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.run_estimate import calibration_estimate
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.files import read_document, write_document
from rq_compile.lowerings import Native, lowering_of
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import DenseFormat
from rq_compile.targets.engine_estimate import engine_estimate
from rq_compile.targets.onnxruntime import compile_engine

TEXT = {"a.txt": "the quick brown fox jumps over the lazy dog " * 8}


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize("lowering", ["native", "stock", "batched"])
def test_an_engine_takes_what_was_estimated(
    stages: Path, model: Path, out: Path, export_once: Callable[[Model], Exported], lowering: str
) -> None:
    """The size of the weights is exact, except for the alignment at the end; those of the graph and the manifest are
    approximate."""
    checkpoint, plan = Model.open(model), read_document(Plan, stages / "plan.json")
    plan = plan.model_copy(update={"quantizer": "nearest"})
    estimate = engine_estimate(checkpoint, out / "x.onnx", lowering, plan=plan)
    manifest = compile_engine(checkpoint, plan, out / "x.onnx", lowering)
    real = written(out)
    assert estimate.outputs.keys() == real.keys()
    assert 0 <= estimate.outputs["x.onnx.data"] - real["x.onnx.data"] < 4096
    assert estimate.outputs["x.tokenizer.json"] == real["x.tokenizer.json"]
    assert estimate.outputs["x.json"] == pytest.approx(real["x.json"], rel=0.2)
    assert estimate.outputs["x.onnx"] == pytest.approx(real["x.onnx"], rel=0.3)
    assert (
        sum(weight.bytes for layer in plan.layers for weight in lowering_of(lowering).expert_weights(layer))
        == manifest.expert_bytes
    )


def test_tied_embeddings_in_16_bit(tmp_path: Path, out: Path) -> None:
    checkpoint = Model.open(tiny.build("granitemoe", tmp_path / "model", dtype=torch.bfloat16))
    settings: dict[str, Any] = {"batch_size": 2, "sequence_length": 32}
    calibration, _ = calibrate(checkpoint, TEXT, progress=lambda *_: None, quantizer="nearest", **settings)
    plan = make_plan(calibration, policy="none", memory=1.0, ranks=1, target="cpu")
    exported = export_graph(checkpoint)
    for dense_format in get_args(DenseFormat):
        estimate = engine_estimate(checkpoint, out / "x.onnx", Native(dense_format=dense_format), plan=plan)
        compile_engine(checkpoint, plan, out / "x.onnx", Native(dense_format=dense_format), exported=exported)
        # Routers stay in fp32; every weight of these tiny ones begins a page, but for those that are written behind others.
        saved = 4096 * 2 * behind_others(out / "x.onnx")
        assert estimate.outputs["x.onnx.data"] == pytest.approx((out / "x.onnx.data").stat().st_size, rel=0.02, abs=16384 + saved)


@pytest.mark.parametrize("quantizer", ["gptq", "nearest"])
def test_a_calibration_takes_what_was_estimated(model: Path, out: Path, rq_compile: Run, quantizer: str) -> None:
    (out / "a.txt").write_text(TEXT["a.txt"])
    arguments = [
        "calibrate",
        model,
        "--text",
        out / "a.txt",
        "--quantizer",
        quantizer,
        "-o",
        out / "x.json",
        "--sequence-length",
        32,
    ]
    result = rq_compile(*arguments, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert names(out) == ["a.txt"]
    estimate = json.loads(result.stdout)
    assert rq_compile(*arguments, "-q").exit_code == 0
    real = written(out)
    del real["a.txt"]
    assert estimate["outputs"].keys() == real.keys()
    assert estimate["outputs"]["x.json"] == pytest.approx(real["x.json"], rel=0.3)
    if quantizer == "gptq":
        assert estimate["outputs"]["x.safetensors"] == pytest.approx(real["x.safetensors"], rel=0.02)


def test_a_dry_run_reads_no_weights(model: Path, stages: Path, tmp_path: Path, rq_compile: Run) -> None:
    """All of them are NaN, which would be rejected if they were read."""
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    file = copy / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    arguments = [copy, "--text", stages / "text.txt", "-o", tmp_path / "x.onnx"]
    result = rq_compile(*arguments, "--dry-run")
    assert result.exit_code == 0, result.stderr
    for words in ("to write", "temporary", "memory", "roughly", "x.onnx.data", "there is no plan yet"):
        assert words in result.stdout
    refused(rq_compile(*arguments, "-q"), 1, "not finite")
    assert names(tmp_path) == ["model"]


def test_a_dry_run_with_a_plan_says_less(model: Path, stages: Path, out: Path, rq_compile: Run) -> None:
    planned, unplanned = (
        json.loads(rq_compile(model, *how, "-o", out / "x.onnx", "--dry-run", "--json").stdout)
        for how in (("--plan", stages / "plan.json"), ("--text", stages / "text.txt"))
    )
    assert planned["temporary_bytes"] == 0 < unplanned["temporary_bytes"]
    assert planned["seconds"] < unplanned["seconds"]
    assert planned["outputs"]["x.onnx.data"] < unplanned["outputs"]["x.onnx.data"]
    assert names(out) == []


def test_a_full_disk_is_noticed_before_the_export(
    model: Path, stages: Path, out: Path, rq_compile: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_compile.targets.onnxruntime.export_graph", lambda _: pytest.fail("it was exported"))
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**12))
    result = rq_compile(model, "--plan", stages / "plan.json", "-o", out / "x.onnx", "-q")
    refused(result, 2, "the engine takes 0.00 GiB", f"{out} has 0.00 GiB free; free space or choose another output with -o")
    assert names(out) == []


def test_layer_by_layer_is_told(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_compile.calibration.memory.available_memory", lambda: 0)
    estimate = calibration_estimate(Model.open(model), TEXT, out / "x.json", batch_size=2, sequence_length=32)
    assert "layer by layer" in estimate.remarks[0]
    rows = len(tiny.tokenizer()(TEXT["a.txt"], add_special_tokens=False).input_ids)
    assert estimate.temporary_bytes >= 8 * rows * 32


def test_a_dry_run_with_a_plan_refuses_what_the_run_would(model: Path, stages: Path, out: Path, rq_compile: Run) -> None:
    plan = read_document(Plan, stages / "plan.json").model_copy(update={"target": "tensorrt", "statistics": None})
    write_document(plan, out / "plan.json")
    for more in ([], ["--dry-run"]):
        result = rq_compile(model, "--plan", out / "plan.json", "-o", out / "x.onnx", "-q", *more)
        refused(result, 2, "the plan is for target tensorrt, but ONNX engines are for cpu, batched or cuda")


def test_a_dry_run_refuses_what_the_run_would(model: Path, stages: Path, out: Path, rq_compile: Run) -> None:
    arguments = ["--text", stages / "text.txt", "--sequence-length", 10_000, "--dry-run"]
    for command in (["calibrate", model, "-o", out / "x.json"], [model, "-o", out / "x.onnx"]):
        refused(rq_compile(*command, *arguments), 2, "--sequence-length 10000 is more than the model's")
