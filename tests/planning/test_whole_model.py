"""Plans for the bytes of a whole engine: joint choice of the formats of experts and non-expert weights, and engines of them."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from command_line import Run, refused
from joined_matrices import behind_others

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.engine.manifest import Manifest
from rq_compile.errors import UserError
from rq_compile.files import read_document
from rq_compile.lowerings import Native, Stock
from rq_compile.planning.dense import FORMATS, whole_of
from rq_compile.planning.plan import make_plan
from rq_compile.planning.problem import problem_of
from rq_compile.planning.schema import Plan
from rq_compile.planning.solver import Objective, solve_on_one_rank
from rq_compile.planning.sweep import Sweep
from rq_compile.quantization.packing import dequantize
from rq_compile.quantization.quantizer import quantize
from rq_compile.reporting.curves import curves
from rq_compile.rewrite import stock_dense
from rq_compile.rewrite.dequantized_dense import dequantized_dense
from rq_compile.runtime.engine import Engine
from rq_compile.targets.engine_estimate import engine_estimate
from rq_compile.targets.onnxruntime import compile_engine
from rq_compile.targets.preflight import check_dense_format, preflight

TEXT = {"a.txt": "the quick brown fox jumps over the lazy dog " * 12, "b.txt": "pack my box with five dozen jugs " * 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With shared experts and an own head, and with matrices that are larger than a page."""
    intermediate: dict[str, Any] = {"shared_expert_intermediate_size": 256, "moe_intermediate_size": 64}
    folder = tmp_path_factory.mktemp("whole") / "model"
    return Model.open(tiny.build("qwen2_moe", folder, dtype=torch.bfloat16, hidden_size=128, vocab_size=512, **intermediate))


@pytest.fixture(scope="module")
def measured(checkpoint: Model) -> tuple[Calibration, dict[str, np.ndarray]]:
    return calibrate(checkpoint, TEXT, batch_size=2, sequence_length=32, progress=lambda *_: None)


def planned(measured: tuple[Calibration, Any], engine_bytes: int, **options: Any) -> Plan:
    given = {"policy": "optimal", "memory": None, "ranks": 1, "target": "cpu"} | options
    return make_plan(measured[0], engine_bytes=engine_bytes, **given)


def most(measured: tuple[Calibration, Any]) -> int:
    """Bytes of the engine in which nothing is rounded."""
    plan = planned(measured, 10**9)
    assert {module.format for module in plan.dense} == {"stored"}
    assert plan.predicted_engine_bytes
    return plan.predicted_engine_bytes


def least(measured: tuple[Calibration, Any]) -> int:
    """Bytes of the smallest engine, as the refusal of a smaller budget says."""
    with pytest.raises(UserError, match=r"the smallest engine takes .* more than --engine-bytes 1000 allows") as smallest:
        planned(measured, 1000)
    return int(str(smallest.value).split("give --engine-bytes ")[1].split()[0])


def between(measured: tuple[Calibration, Any], part: float) -> int:
    fewest = least(measured)
    return int(fewest + part * (most(measured) - fewest))


@pytest.mark.parametrize("part", [0.3, 0.7, 1.0])
def test_an_engine_takes_what_its_plan_says(
    checkpoint: Model, measured: tuple[Calibration, dict[str, np.ndarray]], out: Path, export_once: Any, part: float
) -> None:
    """Except for the ends of pages: the last one, and those of the parts of matrices that are written behind another."""
    budget = between(measured, part)
    plan = planned(measured, budget)
    estimate = engine_estimate(checkpoint, out / "x.onnx", Native(), plan=plan).outputs["x.onnx.data"]
    compile_engine(checkpoint, plan, out / "x.onnx", Native(), Statistics.of(measured[1]), exported=export_once(checkpoint))
    written = (out / "x.onnx.data").stat().st_size
    pages = 4096 * (1 + 2 * behind_others(out / "x.onnx"))
    assert plan.predicted_engine_bytes
    assert 0 <= plan.predicted_engine_bytes - written < pages
    assert 0 <= estimate - written < pages
    assert written <= budget
    assert (part < 0.5) <= any(module.format != "stored" for module in plan.dense)
    assert (part == 1) <= all(module.format == "stored" for module in plan.dense)


def test_the_joint_choice_is_the_best_of_all(measured: tuple[Calibration, Any]) -> None:
    """Compared with every combination of the modules' formats, each with the best experts for what it leaves."""
    whole = whole_of(measured[0], 10**9, "cpu")
    kept = [0, 3, len(whole.modules) - 1]
    fewer = replace(whole, modules=tuple(whole.modules[place] for place in kept))
    problem = problem_of(measured[0], target="cpu", ranks=1, memory=1.0, smoothing=1.0, whole=fewer)
    objective = Objective(1.01, 1.0, 1.0, 0.0, False)
    sizes = [np.broadcast_to(layer.size, (layer.experts, len(layer.size))) for layer in problem.layers]
    sizes += [item.size[None] for item in fewer.modules]
    room = sum(int(some.min(axis=1).sum() + some.max(axis=1).sum()) for some in sizes) // 2
    found = solve_on_one_rank(problem, objective, room)
    assert found is not None
    values = []
    for formats in itertools.product(range(len(FORMATS)), repeat=len(kept)):
        rest = room - fewer.bytes_of(formats)
        experts = solve_on_one_rank(replace(problem, whole=replace(fewer, modules=())), objective, rest)
        if experts is not None:
            values.append(experts.value + fewer.error_of(formats))
    assert found.bound * (1 - 1e-9) <= min(values) <= found.value * (1 + 1e-9)
    assert found.value == pytest.approx(min(values), rel=0.02)


@pytest.mark.parametrize("lowering", ["native", "stock", "stock with the products of cuda"])
def test_a_plan_runs_with_the_values_that_it_stores(
    checkpoint: Model,
    measured: tuple[Calibration, dict[str, np.ndarray]],
    out: Path,
    export_once: Any,
    monkeypatch: pytest.MonkeyPatch,
    lowering: str,
) -> None:
    """Logits of the engine against transformers with the rounded matrices, table and head."""
    lowering, _, products = lowering.partition(" ")
    if products:
        monkeypatch.setattr(stock_dense, "stock_dense", lambda graph, dense, level: dequantized_dense(graph, dense))
        # On the CPU, ONNX Runtime would fuse DequantizeLinear into products that round activations to int8.
        monkeypatch.setattr(Stock, "session_options", {"session.qdq_matmulnbits_accuracy_level": "0"})
    plan = planned(measured, 10**9)
    plan = plan.model_copy(
        update={
            "quantizer": "nearest",
            "dense": [
                module.model_copy(update={"format": ("int8", "int4")[place % 2]}) for place, module in enumerate(plan.dense)
            ],
        }
    )
    model: Any = load_model(checkpoint)
    for module in plan.dense:
        for matrix in module.matrices:
            weight = model.get_parameter(matrix.name)
            assert module.format != "stored"
            values = dequantize(quantize(weight.numpy(), module.format), module.format, matrix.columns)
            weight.copy_(torch.from_numpy(values))
    compile_engine(checkpoint, plan, out / "x.onnx", lowering, exported=export_once(checkpoint))
    ids = np.arange(10, 40)[None]
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    found = Engine.load(out / "x.onnx").logits(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_the_graph_for_cuda_takes_what_its_plan_says(
    checkpoint: Model, measured: tuple[Calibration, dict[str, np.ndarray]], out: Path, export_once: Any
) -> None:
    most = planned(measured, 10**9, target="cuda").predicted_engine_bytes
    assert most
    plan = planned(measured, most * 2 // 3, target="cuda")
    rounded = [matrix for module in plan.dense if module.format != "stored" for matrix in module.matrices]
    assert rounded
    compile_engine(checkpoint, plan, out / "x.onnx", "cuda", Statistics.of(measured[1]), exported=export_once(checkpoint))
    assert plan.predicted_engine_bytes
    assert 0 <= plan.predicted_engine_bytes - (out / "x.onnx.data").stat().st_size < 4096
    nodes = onnx.load(out / "x.onnx", load_external_data=False).graph.node
    tables = sum(module.kind == "embedding" and module.format != "stored" for module in plan.dense)
    assert sum(node.op_type == "DequantizeLinear" for node in nodes) == len(rounded) - tables


def test_lowerings_and_options_that_contradict_the_plan_are_refused(checkpoint: Model, measured: tuple[Calibration, Any]) -> None:
    plan = planned(measured, between(measured, 0.2))
    with pytest.raises(UserError, match="--lowering batched does not round non-expert weights; use --lowering native"):
        preflight(checkpoint, plan, "batched")
    with pytest.raises(UserError, match="--dense-format int8 contradicts the plan, which chooses the formats"):
        check_dense_format(plan, "int8")
    check_dense_format(planned(measured, 10**9).model_copy(update={"dense": []}), "int8")


def test_budgets_that_cannot_be_met_and_calibrations_that_do_not_measure(measured: tuple[Calibration, Any]) -> None:
    assert planned(measured, least(measured) + 4096 * 64).predicted_engine_bytes
    with pytest.raises(UserError, match="--engine-bytes is for --target cpu, cuda, not for tensorrt"):
        planned(measured, 10**9, target="tensorrt")
    with pytest.raises(UserError, match="--engine-bytes is for policy optimal, not for paper"):
        planned(measured, 10**9, policy="paper")
    with pytest.raises(UserError, match="--memory 1 and --engine-bytes 1000000000 are two budgets"):
        planned(measured, 10**9, memory=1.0)
    old = measured[0].model_copy(update={"dense": []})
    with pytest.raises(UserError, match="does not measure the non-expert weights; calibrate again on texts"):
        planned((old, {}), 10**9)


@pytest.mark.parametrize("part", [0.02, 0.3])
def test_the_fewest_bytes_are_read_within_an_error(measured: tuple[Calibration, Any], part: float) -> None:
    """The sum of all errors is kept, nearly used up, and no other single choice reads fewer bytes."""
    calibration = measured[0]
    whole = whole_of(calibration, 10**9, "cpu")
    problem = problem_of(calibration, target="cpu", ranks=1, memory=1.0, smoothing=1.0, whole=whole)
    limit = part * (sum(layer.error[:, -1].sum() for layer in problem.layers) + whole.error_of([2] * len(whole.modules)))
    plan = planned(measured, 10**9, objective="bytes-read", max_error=limit)
    error, read = 0.0, 0.0
    moves: list[tuple[float, float]] = []
    for layer, slots in zip(problem.layers, plan.layers, strict=True):
        share = np.minimum(1, np.array(layer.calibration.load) / sum(layer.calibration.load) * layer.geometry.top_k)
        for slot in slots.slots:
            now = layer.formats.index(slot.format)
            error, read = error + layer.error[slot.expert, now], read + share[slot.expert] * layer.size[now]
            moves += zip(
                layer.error[slot.expert] - layer.error[slot.expert, now],
                share[slot.expert] * (layer.size - layer.size[now]),
                strict=True,
            )
    for item, module in zip(whole.modules, plan.dense, strict=True):
        now = FORMATS.index(module.format)
        error, read = error + item.error[now], read + item.read[now]
        moves += zip(item.error - item.error[now], item.read - item.read[now], strict=True)
    assert error <= limit
    assert plan.optimality
    assert plan.optimality.objective == pytest.approx(read)
    assert plan.optimality.bound <= plan.optimality.objective
    assert not any(saved < 0 and error + more <= limit * (1 - 1e-6) for more, saved in moves)


def test_what_bytes_read_needs(measured: tuple[Calibration, Any]) -> None:
    with pytest.raises(UserError, match="--objective bytes-read needs the error that you accept"):
        planned(measured, 10**9, objective="bytes-read")
    with pytest.raises(UserError, match="is for ragged kernels on one rank, but cpu with 2 ranks waits"):
        planned(measured, 10**9, objective="bytes-read", max_error=0.01, ranks=2)
    with pytest.raises(UserError, match="keeps the sum of all errors below max_error 1e-12"):
        planned(measured, between(measured, 0.1), objective="bytes-read", max_error=1e-12)


def test_ranks_share_the_modules(measured: tuple[Calibration, Any]) -> None:
    """Copies, formats of experts and of modules, and ranks together, with a bound."""
    plan = planned(measured, between(measured, 0.5), ranks=2)
    assert plan.predicted_engine_bytes
    assert plan.engine_bytes
    assert plan.predicted_engine_bytes <= plan.engine_bytes
    assert plan.optimality
    assert 0 < plan.optimality.bound <= plan.optimality.objective
    assert {slot.rank for layer in plan.layers for slot in layer.slots} == {0, 1}


def test_the_command(checkpoint: Model, measured: tuple[Calibration, Any], tmp_path: Path, rq_compile: Run) -> None:
    (tmp_path / "c.json").write_text(measured[0].model_copy(update={"statistics": None}).model_dump_json())
    budget = between(measured, 0.3)
    result = rq_compile("plan", tmp_path / "c.json", "-o", tmp_path / "p.json", "--engine-bytes", budget)
    assert result.exit_code == 0, result.stderr
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["engine_bytes"] == budget >= plan["predicted_engine_bytes"]
    assert "shared experts" in result.stdout


def test_one_go(checkpoint: Model, measured: tuple[Calibration, Any], out: Path, rq_compile: Run) -> None:
    """Compiling without a plan calibrates, plans for the bytes of the engine, and keeps to them. The report shows the modules."""
    texts = []
    for name, content in TEXT.items():
        (out.parent / name).write_text(content)
        texts += ["--text", out.parent / name]
    budget = between(measured, 0.3)
    shape = ["--batch-size", 2, "--sequence-length", 32]
    result = rq_compile(checkpoint.path, *texts, *shape, "--engine-bytes", budget, "-o", out / "x.onnx")
    assert result.exit_code == 0, result.stderr
    manifest = read_document(Manifest, out / "x.json")
    assert manifest.plan.engine_bytes == budget >= manifest.weights.bytes
    assert {module.format for module in manifest.plan.dense} > {"stored"}
    estimate = rq_compile(checkpoint.path, *texts, *shape, "--engine-bytes", budget, "-o", out / "y.onnx", "--dry-run", "--json")
    assert estimate.exit_code == 0, estimate.stderr
    assert json.loads(estimate.stdout)["outputs"]["y.onnx.data"] == budget
    (out / "c.json").write_text(measured[0].model_copy(update={"statistics": None}).model_dump_json())
    assert rq_compile("plan", out / "c.json", "--sweep", "--engine-bytes", 10**7, "-o", out / "sweep.json").exit_code == 0
    report = rq_compile("report", out / "x.onnx", "--sweep", out / "sweep.json", "-o", out / "report.html")
    assert report.exit_code == 0, report.stderr
    page = (out / "report.html").read_text()
    for module in manifest.plan.dense:
        assert f"{module.name}</th><td>{module.kind}</td><td>{module.format}</td>" in page
    assert "This engine, engine of" in page
    stored = manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"engine_bytes": None, "model_error": None})})
    marks = [mark.here for curve in curves(read_document(Sweep, out / "sweep.json"), stored.plan) for mark in curve.marks]
    assert marks
    assert not any(marks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--dense-format", "int8"],
            "--dense-format int8 and --engine-bytes 1000000 both choose the formats of non-expert weights",
        ),
        (["--lowering", "batched"], "--engine-bytes is for --target cpu, cuda, not for batched"),
        (["--policy", "paper"], "--engine-bytes is for policy optimal, not for paper"),
        (["--memory", "0.5"], "--memory 0.5 and --engine-bytes 1000000 are two budgets"),
        (["--policy", "none", "--objective", "bytes-read"], "--objective bytes-read has no effect with --policy none"),
        (["--objective", "error", "--option", "objective=error"], "--option objective=error and --objective error are given"),
    ],
)
def test_one_go_refuses_before_it_calibrates(
    checkpoint: Model, out: Path, rq_compile: Run, options: list[str], words: str
) -> None:
    (out.parent / "a.txt").write_text(TEXT["a.txt"])
    given = (checkpoint.path, "--text", out.parent / "a.txt", "--engine-bytes", 10**6, *options, "-o", out / "x.onnx")
    refused(rq_compile(*given), 2, words)
    assert not list(out.iterdir())


def test_a_plan_file_excludes_a_budget(checkpoint: Model, out: Path, rq_compile: Run) -> None:
    (out.parent / "p.json").write_text("{}")
    result = rq_compile(checkpoint.path, "--plan", out.parent / "p.json", "--engine-bytes", "1G", "-o", out / "x.onnx")
    refused(result, 2, "--engine-bytes has no effect with --plan")
