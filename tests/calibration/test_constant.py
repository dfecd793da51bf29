"""Experts that are replaced by their mean outputs: measured, merged, planned, compiled and run."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import LENGTH, SWIGLU, inputs, letters, measured
from command_line import Run, refused
from mpi import mpirun, needs_mpi, spread
from safetensors.numpy import load_file

from rq_compile.architectures.layers import ExpertWeights
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.constant import mean_outputs
from rq_compile.calibration.estimate import relative_errors
from rq_compile.calibration.measure import measure_layer
from rq_compile.calibration.merge import merge, merge_statistics, with_constants
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.runtime.engine import Engine
from rq_compile.targets.onnxruntime import compile_engine

SUPPORT = Path(__file__).parents[1] / "support"
Tiny = Callable[[str], Path]


def outputs(checkpoint: Model, layer: Any, expert: int, x: np.ndarray) -> np.ndarray:
    """float64 ``[n, hidden]`` of an expert with swiglu."""
    weights = checkpoint.expert(layer, expert)
    gate, up = np.split(x.astype(np.float64) @ weights.up.astype(np.float64).T, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ weights.down.astype(np.float64).T


def test_the_sums_are_those_of_the_definition(tiny_checkpoint: Tiny) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    layer = checkpoint.layers[0]
    hidden, ids, gates = inputs(layer.geometry, 160)
    found = measured(checkpoint, layer, (hidden, ids, gates), formats=("int8", "constant"), quantizer="nearest")
    assert list(found.error) == ["int8", "constant"]
    means = mean_outputs(found.weighted_outputs, found.squared_gates)
    for expert in range(layer.geometry.experts):
        token, choice = np.nonzero(ids == expert)
        y, squared = outputs(checkpoint, layer, expert, hidden[token]), gates[token, choice].astype(np.float64) ** 2
        mean = (squared[:, None] * y).sum(0) / squared.sum()
        np.testing.assert_allclose(means[expert], mean, rtol=1e-4, atol=1e-6)
        lost = float((squared[:, None] * (y - mean) ** 2).sum())
        np.testing.assert_allclose(found.error["constant"][expert], lost, rtol=1e-4)
        assert (squared[:, None] * (y - 1.05 * mean) ** 2).sum() > lost


def test_experts_with_few_tokens_are_estimated_and_unreached_ones_are_zero() -> None:
    random = np.random.default_rng(0)
    hidden, _, gates = inputs(SWIGLU, 60)
    ids = np.stack([np.arange(60) % 3, np.full(60, 3)], axis=1)
    ids[0, 0] = 4  # expert 4 has one token, expert 5 none
    experts = [
        ExpertWeights(random.standard_normal((40, 48)).astype(np.float32), random.standard_normal((48, 20)).astype(np.float32))
        for _ in range(SWIGLU.experts)
    ]
    found = measure_layer(SWIGLU, hidden, ids, gates, lambda e: experts[e], formats=("constant",), quantizer="nearest")
    errors, estimated = relative_errors(found, found.pairs)
    assert estimated.tolist() == [False] * 4 + [True] * 2
    assert found.error["constant"][4] < 1e-3 * found.energy[4]  # the mean of one output is this output
    assert errors["constant"][4] > 1e-3
    assert errors["constant"][5] > 1e-3
    assert not mean_outputs(found.weighted_outputs, found.squared_gates)[5].any()


def calibrated(model: Path, *texts: str, **options: Any) -> tuple[Calibration, dict[str, np.ndarray]]:
    given: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "progress": lambda done, total: None} | options
    named = {f"{text[:4]}.txt": text for text in texts}
    return calibrate(Model.open(model), named, formats=("int8", "constant"), **given)


@pytest.mark.parametrize("quantizer", ["nearest", "gptq"])
def test_calibrations_add_up(tiny_checkpoint: Tiny, quantizer: str) -> None:
    """Also the errors, although they are those of another mean."""
    run = partial(calibrated, tiny_checkpoint("olmoe"), quantizer=quantizer)
    one, two = letters(340, 1), letters(431, 2)
    parts, expected = [run(one), run(two)], run(one, two)
    added = merge({Path(f"{number}.json"): part for number, (part, _) in enumerate(parts)})
    tensors = merge_statistics(added.layers, [(1.0, found) for _, part in parts if (found := Statistics.of(part))], added.dense)
    made = with_constants(added, tensors)
    assert tensors.keys() == expected[1].keys()
    for layer, merged, wanted in zip(added.layers, made.layers, expected[0].layers, strict=True):
        assert merged.sums
        assert wanted.sums
        assert layer.sums
        np.testing.assert_allclose(merged.sums.error["constant"], wanted.sums.error["constant"], rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(merged.error["constant"], wanted.error["constant"], rtol=2e-4)
        assert np.less(layer.sums.error["constant"], np.multiply(merged.sums.error["constant"], 1 - 1e-6)).any()
        for name in ("weighted_output", "squared_gates"):
            tensor = f"{layer.name}.{name}"
            np.testing.assert_allclose(tensors[tensor], expected[1][tensor], rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def stages_of(tiny_checkpoint: Tiny, rq_compile: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """calibration.json and plan.json, whose slots are in the checkpoint's format or constant."""
    folder, model = tmp_path_factory.mktemp("constant"), tiny_checkpoint("olmoe")
    (folder / "text.txt").write_text(letters(700, 3))
    dtype = Model.open(model).dtype
    for arguments in (
        ("calibrate", model, "--text", folder / "text.txt", "--sequence-length", 64, "--formats", "int8,int4,constant"),
        ("plan", folder / "calibration.json", "--memory", 0.7, "--option", f"formats={dtype},constant"),
    ):
        result = rq_compile(*arguments, "-q", "-o", folder / f"{'calibration' if arguments[0] == 'calibrate' else 'plan'}.json")
        assert result.exit_code == 0, result.stderr
    return folder


def expected_logits(checkpoint: Model, plan: Plan, statistics: Statistics, ids: np.ndarray) -> np.ndarray:
    """Of transformers, with the plan's constant experts replaced."""
    model = load_model(checkpoint)
    for layer in plan.layers:
        module = model.get_submodule(layer.name)

        def forward(
            hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, own: Any = module.forward, layer: Any = layer
        ) -> torch.Tensor:
            constant = torch.isin(ids, torch.tensor(layer.constant_experts))
            y = own(hidden, ids, gates * ~constant)
            for expert in layer.constant_experts:
                share = (gates * (ids == expert)).sum(1, keepdim=True)
                y = y + share * torch.from_numpy(statistics.mean_output(layer.name, expert))
            return y

        module.forward = forward
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("lowering", ["native", "stock", "batched"])
def test_an_engine_is_the_model_with_these_experts_replaced(
    lowering: str, stages_of: Path, model: Path, export_once: Callable, tmp_path: Path
) -> None:
    checkpoint, plan = Model.open(model), read_document(Plan, stages_of / "plan.json")
    assert plan.statistics
    assert sum(len(layer.constant_experts) for layer in plan.layers) >= 4
    statistics = Statistics.beside(stages_of, plan.statistics)
    manifest = compile_engine(checkpoint, plan, tmp_path / "engine.onnx", lowering, statistics, exported=export_once(checkpoint))
    constant = sum(len(layer.constant_experts) for layer in plan.layers)
    assert manifest.replaced["slots in constant"] == constant
    ids = np.random.default_rng(0).integers(4, 90, (3, 21))
    logits, rows = Engine.load(tmp_path / "engine.onnx", 1).counted_logits(ids)
    np.testing.assert_allclose(logits, expected_logits(checkpoint, plan, statistics, ids), atol=2e-4)
    assert all(counted.sum() == 63 * layer.geometry.top_k for layer, counted in zip(plan.layers, rows.values(), strict=True))
    if lowering == "native":
        assert manifest.expert_bytes == plan.stored_bytes


@needs_mpi
def test_ranks_do_not_exchange_rows_of_constant_experts(
    stages_of: Path, model: Path, export_once: Callable, tmp_path: Path
) -> None:
    """Bit for bit what one engine computes, and every token of a constant expert is counted once."""
    checkpoint, plan = Model.open(model), read_document(Plan, stages_of / "plan.json")
    assert plan.statistics
    statistics = Statistics.beside(stages_of, plan.statistics)
    plan = spread(plan, 3, lambda layer, place, slot: (place * 5 + layer.index) % 3 if layer.index else place % 2)
    exported = export_once(checkpoint)
    compile_engine(checkpoint, plan, tmp_path / "engine", "ranks", statistics, exported=exported)
    compile_engine(checkpoint, plan, tmp_path / "one.onnx", "native", statistics, exported=exported)
    ids, sequences = np.random.default_rng(0).integers(4, 90, (5, 9)), (2, 0, 3)
    np.savez(tmp_path / "given.npz", ids=ids, decoder=ids, sequences=sequences)
    ran = mpirun(3, SUPPORT / "rank_steps.py", tmp_path / "engine", tmp_path / "given.npz")
    assert (ran.returncode, ran.stderr) == (0, "")
    logits, rows = Engine.load(tmp_path / "one.onnx", 1).counted_logits(ids)
    of_rank = [np.load(tmp_path / f"{rank}.npz") for rank in range(3)]
    assert np.array_equal(np.concatenate([found["logits"] for found in of_rank]), logits)
    for found in of_rank:
        assert all(np.array_equal(found[f"rows of {layer}"], counted) for layer, counted in rows.items())


def test_commands_show_constant_experts(stages_of: Path, model: Path, rq_compile: Run, tmp_path: Path) -> None:
    plan = read_document(Plan, stages_of / "plan.json")
    constant, engine = sum(len(layer.constant_experts) for layer in plan.layers), tmp_path / "engine.onnx"
    assert any(f"{constant} experts are replaced by their mean outputs" in remark for remark in plan.remarks)
    assert rq_compile(model, "--plan", stages_of / "plan.json", "-o", engine, "-q").exit_code == 0
    for arguments in (
        ("inspect", stages_of / "plan.json"),
        ("inspect", engine),
        ("generate", engine, "--max-tokens", 3, "--prompt", "ab"),
        ("evaluate", engine, "--reference", model, "--text", stages_of / "text.txt", "--sequence-length", 64),
        ("bench", engine, "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1),
        ("report", engine, "-o", tmp_path / "report.html"),
    ):
        result = rq_compile(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)
        if arguments[0] == "inspect":
            assert "constant:" in result.stdout
    assert "constant" in (tmp_path / "report.html").read_text()


def test_a_package_for_mone_has_the_list_and_the_vectors(stages_of: Path, rq_compile: Run, tmp_path: Path) -> None:
    """As a fork of vLLM reads them."""
    result = rq_compile("package", stages_of / "plan.json", "--for", "mone", "-o", tmp_path / "mone", "--json")
    assert result.exit_code == 0, result.stderr
    entries = json.loads((tmp_path / "mone" / "mone.json").read_text())
    plan = read_document(Plan, stages_of / "plan.json")
    listed = {str(layer.index): sorted(layer.constant_experts) for layer in plan.layers if layer.constant_experts}
    assert entries == {
        "mone": {"version": 1, "replacement_type": "constant", "experts_by_layer": listed},
        "approximate_experts": listed,
    }
    assert plan.statistics
    statistics, vectors = Statistics.beside(stages_of, plan.statistics), load_file(tmp_path / "mone" / "mone.safetensors")
    assert len(vectors) == sum(map(len, listed.values()))
    for layer in plan.layers:
        for expert in layer.constant_experts:
            vector = vectors[f"{layer.name}.{expert}.approx_value"]
            assert np.array_equal(vector, statistics.mean_output(layer.name, expert))
            assert vector.shape == (layer.geometry.hidden,)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--memory", 1.0), "has no experts in constant"),
        (("--memory", 0.1, "--option", "formats=int8,int4,constant"), "has rounded experts ("),
        (("--memory", 0.7, "--target", "batched", "--option", "formats=fp32,constant"), "replicas, which mone would lose"),
    ],
)
def test_plans_that_mone_cannot_say(
    options: tuple[object, ...], told: str, stages_of: Path, rq_compile: Run, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    result = rq_compile("plan", stages_of / "calibration.json", *options, "-q", "-o", plan)
    assert result.exit_code == 0, result.stderr
    refused(rq_compile("package", plan, "--for", "mone", "-o", tmp_path / "mone"), 2, told)
    assert not (tmp_path / "mone").exists()


@pytest.mark.parametrize("statistics", ["of another calibration", "none"])
def test_a_plan_edited_by_hand(statistics: str, stages: Path, model: Path, rq_compile: Run, tmp_path: Path) -> None:
    plan = json.loads((stages / "plan.json").read_text())
    layer = plan["layers"][1]
    alone = next(e for e in range(8) if sum(slot["expert"] == e for slot in layer["slots"]) == 1)
    next(slot for slot in layer["slots"] if slot["expert"] == alone)["format"] = "constant"
    if statistics == "none":
        plan |= {"statistics": None, "quantizer": "nearest"}
    else:
        plan["statistics"]["name"] = str(stages / plan["statistics"]["name"])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refused(
        rq_compile(model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "engine.onnx", "-q"),
        2,
        f"the plan replaces expert {alone} of layer 1 by its mean output, which was not measured",
        "--formats",
    )


def test_a_calibration_without_text_has_no_outputs(model: Path, rq_compile: Run, tmp_path: Path) -> None:
    arguments = ("--data-free", "--formats", "int8,constant", "-o", tmp_path / "calibration.json")
    refused(rq_compile("calibrate", model, *arguments), 2, "--data-free measures no outputs for constant")


def test_rounding_to_the_nearest_keeps_only_the_outputs(
    stages_of: Path, model: Path, rq_compile: Run, export_once: Callable, tmp_path: Path
) -> None:
    """And calibrations in files merge."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(letters(200, len(name) + ord(name[0])))
        arguments = ("--text", tmp_path / f"{name}.txt", "--sequence-length", 64, "--quantizer", "nearest")
        made = rq_compile("calibrate", model, *arguments, "--formats", "int8,constant", "-q", "-o", tmp_path / f"{name}.json")
        assert made.exit_code == 0, made.stderr
    merged, plan = tmp_path / "merged.json", tmp_path / "plan.json"
    assert rq_compile("merge", tmp_path / "one.json", tmp_path / "two.json", "-q", "-o", merged).exit_code == 0
    assert rq_compile("plan", merged, "--memory", 0.2, "-q", "-o", plan).exit_code == 0
    document = read_document(Plan, plan)
    assert any(layer.constant_experts for layer in document.layers)
    result = rq_compile(model, "--plan", plan, "-q", "-o", tmp_path / "engine.onnx")
    assert result.exit_code == 0, result.stderr
