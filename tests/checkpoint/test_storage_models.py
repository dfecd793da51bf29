"""Checkpoints in every storage format through all stages, compared with transformers on the same weights, dequantized."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_storage
from calibrated import LENGTH, TEXTS
from click.testing import Result
from transformers import Glm4MoeConfig

from rq_compile.architectures.layers import PROJECTIONS
from rq_compile.architectures.model import Model
from rq_compile.calibration import calibrate as calibrate_module
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.memory import Way
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.files import read_document
from rq_compile.inspection import inspected
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import SLOT_FORMATS, Format
from rq_compile.quantization.packing import dequantize
from rq_compile.quantization.quantizer import carried
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

# The smallest slot format that can hold what the storage format stores, and its block.
LOSSLESS: dict[str, tuple[Format, int]] = {
    "fp8": ("fp8", 32),
    "fp8-qscale": ("fp8", 128),
    "mxfp8": ("fp8", 32),
    "fp8-ue8m0-fp4": ("mxfp4", 32),
    "mxfp4": ("mxfp4", 32),
    "mxfp4-pack": ("mxfp4", 32),
    "nvfp4-fp8": ("int8", 16),
    "modelopt-mixed": ("int8", 16),
    "pack-int4": ("int4", 32),
    "pack-int4-asymmetric": ("int8", 32),
    "pack-int4-act-order": ("fp32", 32),
    "pack-int8": ("int8", 128),
    "float-quantized": ("fp8", 128),
    "modelopt-fp8": ("fp8", 128),
    "modelopt-awq": ("fp32", 128),
    "gptq": ("int8", 32),
    "gptq-v2-act-order": ("fp32", 32),
    "awq": ("int8", 32),
}
Calibrated = tuple[Calibration, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def exported_once() -> Callable[[str, Model], Exported]:
    """The graph does not depend on how weights are stored."""
    graphs: dict[str, Exported] = {}

    def exported(name: str, model: Model) -> Exported:
        format = tiny_storage.FORMATS[name]
        key = f"{format.family} {sorted(format.changes.items())}"
        if key not in graphs:
            graphs[key] = export_graph(model)
        return graphs[key]

    return exported


@pytest.fixture(scope="module", params=tiny_storage.FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(tiny_storage.build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def dequantized(model: Model) -> Reference:
    return Reference.load(Model.open(model.path.parent / "dequantized"))


def calibrated(model: Model, whole: bool) -> Calibrated:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_module, "choose_way", lambda *_, **__: Way(whole, True, "as asked for"))
        return calibrate(model, TEXTS, batch_size=4, sequence_length=LENGTH, progress=lambda done, total: None)


@pytest.fixture(scope="module")
def calibration(model: Model) -> Calibrated:
    return calibrated(model, whole=True)


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(4, tiny.VOCABULARY, shape)


def test_transformers_computes_with_the_decoded_weights(model: Model, dequantized: Reference) -> None:
    np.testing.assert_array_equal(Reference.load(model).logits(tokens(2, 9)), dequantized.logits(tokens(2, 9)))


def test_it_is_said_how_experts_are_stored(model: Model, calibration: Calibrated) -> None:
    found = inspected(model.checkpoint)
    assert found.compiles, found.why_not
    assert found.expert_bytes == sum(layer.stored_bytes or 0 for layer in calibration[0].layers)
    assert found.expert_bytes == sum(
        weight.bytes for weight in model.checkpoint.weights() if "experts" in weight.name and "shared" not in weight.name
    )
    for layer, measured in zip(found.layers, calibration[0].layers, strict=True):
        assert layer.stored == ", ".join(measured.stored_as or [])


def test_what_a_slot_can_hold_is_carried_over_without_an_error(name: str, calibration: Calibrated) -> None:
    format, block = LOSSLESS[name]
    assert calibration[0].dtype == format
    for layer in calibration[0].layers:
        assert layer.geometry.block == block
        assert not any(layer.error[format])
        assert any(layer.error["int4"]) == (format != "int4")


def test_calibrating_layer_by_layer_is_the_same(model: Model, calibration: Calibrated) -> None:
    streamed, _ = calibrated(model, whole=False)
    for one, other in zip(calibration[0].layers, streamed.layers, strict=True):
        assert one.load == other.load
        for format, error in one.error.items():
            # GPTQ may round a weight that lies between two numbers to either one, and few weights make these tiny experts.
            np.testing.assert_allclose(other.error[format], error, rtol=1e-1, atol=1e-12, err_msg=format)


def test_engines(
    name: str,
    model: Model,
    calibration: Calibrated,
    dequantized: Reference,
    exported_once: Callable[[str, Model], Exported],
    tmp_path: Path,
) -> None:
    """The engines of a plan that changes nothing, and of one within the budget."""
    calibrated, statistics = calibration
    stored = sum(layer.stored_bytes or 0 for layer in calibrated.layers)
    for policy in ("none", "optimal"):
        plan = make_plan(calibrated, policy=policy, memory=None, ranks=1, target="cpu")
        assert plan.bytes_before == stored
        assert plan.bytes_after <= plan.memory * stored
        assert ", ".join(calibrated.layers[0].stored_as or []) in plan.remarks[0]
        output = tmp_path / f"{policy}.onnx"
        compile_engine(model, plan, output, "native", Statistics.of(statistics), exported_once(name, model))
        engine = Engine.load(output, threads=1)
        ids = tokens(2, 9)
        if policy == "none":
            np.testing.assert_allclose(engine.logits(ids), dequantized.logits(ids), rtol=0, atol=1e-4)
            expected = list(dequantized.generate(ids[0].tolist(), 6, stop=False))
            assert list(engine.generate(ids[0].tolist(), 6, stop=False)) == expected
        else:
            assert np.isfinite(engine.logits(ids)).all()


@pytest.mark.parametrize("name", [n for n, (f, _) in LOSSLESS.items() if SLOT_FORMATS[f].only_carried], scope="module")
def test_slots_hold_exactly_what_the_checkpoint_stores(name: str, model: Model, calibration: Calibrated) -> None:
    """Every value. MXFP4 takes as many bytes as in the checkpoint."""
    format, _ = LOSSLESS[name]
    for layer, measured in zip(model.layers, calibration[0].layers, strict=True):
        geometry = measured.geometry
        if format == "mxfp4":
            assert geometry.experts * geometry.expert_bytes(format) == measured.stored_bytes
        for expert, projection in itertools.product(range(geometry.experts), PROJECTIONS):
            held = carried(model.source_numbers(layer, expert, projection), format, geometry.block)
            assert held is not None
            exact = model.matrix(layer, expert, projection).astype(np.float32)
            np.testing.assert_array_equal(dequantize(held, format, exact.shape[1]), exact)


@pytest.mark.parametrize("lowering", ["stock", "batched"])
@pytest.mark.parametrize("name", ["nvfp4-fp8", "pack-int4", "mxfp4", "fp8"], scope="module")
def test_other_lowerings_carry_whole_numbers_over_too(
    lowering: str,
    name: str,
    model: Model,
    calibration: Calibrated,
    dequantized: Reference,
    exported_once: Callable[[str, Model], Exported],
    tmp_path: Path,
) -> None:
    plan = make_plan(calibration[0], policy="none", memory=None, ranks=1, target="cpu")
    compile_engine(model, plan, tmp_path / "e.onnx", lowering, Statistics.of(calibration[1]), exported_once(name, model))
    logits = Engine.load(tmp_path / "e.onnx", threads=1).logits(tokens(2, 9))
    np.testing.assert_allclose(logits, dequantized.logits(tokens(2, 9)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["nvfp4-fp8", "pack-int4", "fp8"])
def test_families_without_a_declaration(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole numbers are found through what transformers' loader does with the tensors."""
    config = {**tiny.COMMON, "hidden_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4, "head_dim": 16}
    monkeypatch.setitem(tiny.CONFIGS, "glm4_moe", lambda: Glm4MoeConfig(**config, n_shared_experts=1, first_k_dense_replace=1))
    made = replace(tiny_storage.FORMATS[name], family="glm4_moe", changes={})
    monkeypatch.setitem(tiny_storage.FORMATS, "made", made)
    model = Model.open(tiny_storage.build("made", tmp_path))
    calibration = calibrated(model, whole=False)[0]
    format, block = LOSSLESS[name]
    assert (calibration.dtype, calibration.layers[0].geometry.block) == (format, block)
    assert not any(calibration.layers[0].error[format])
    layer = model.layers[0]
    for projection in PROJECTIONS:
        integers = model.source_numbers(layer, 1, projection)
        assert integers is not None
        values = integers.numbers.astype(np.float32) * np.repeat(integers.scales, integers.group, axis=1)
        np.testing.assert_array_equal(values, model.matrix(layer, 1, projection))
    dequantized = Reference.load(Model.open(tmp_path / "dequantized"))
    np.testing.assert_array_equal(Reference.load(model).logits(tokens(2, 9)), dequantized.logits(tokens(2, 9)))


def test_commands(rq_compile: Callable[..., Result], tmp_path: Path) -> None:
    """In one command, with only MODEL and a text: the smallest memory that works is used and reported."""
    folder = tiny_storage.build("mxfp4", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(TEXTS["first.txt"] * 4)
    shown = rq_compile("inspect", folder)
    assert shown.exit_code == 0, shown.stderr
    assert "MXFP4" in shown.stdout
    for dry in (["--dry-run"], []):
        made = rq_compile(folder, "--text", text, "--sequence-length", 64, "-o", tmp_path / "engine.onnx", *dry)
        assert made.exit_code == 0, made.stderr
    assert rq_compile("generate", tmp_path / "engine.onnx", "--prompt", "abc", "--max-tokens", 2).exit_code == 0
    made = rq_compile("calibrate", folder, "--text", text, "--sequence-length", 64, "-o", tmp_path / "c.json")
    assert made.exit_code == 0, made.stderr
    assert "int8 mxfp4" in made.stdout  # the formats without loss
    made = rq_compile("plan", tmp_path / "c.json", "--memory", 1, "-o", tmp_path / "p.json")
    assert made.exit_code == 0, made.stderr
    plan = read_document(Plan, tmp_path / "p.json")
    assert {slot.format for layer in plan.layers for slot in layer.slots} == {"mxfp4"}
    refused = rq_compile("plan", tmp_path / "c.json", "--memory", 0.9, "-o", tmp_path / "q.json")
    assert refused.exit_code == 1
    assert "give --memory 1" in refused.stderr
