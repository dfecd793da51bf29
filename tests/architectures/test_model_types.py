"""Model types of transformers from checkpoint to engine, compared with transformers itself.

All of them take half an hour. A run takes the popular ones and some others, another selection each day; ``RQ_MODEL_TYPES=all``
(``make families``, which writes what was found into docs/families.md) takes all, names separated by commas take those.
"""

import datetime
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alone_and_together
import families_table
import model_types
import numpy as np
import pass_counts
import plans
import pytest
import tiny
import tiny_storage
import torch
from calibrated import LENGTH, TEXTS, same
from command_line import run_command
from transformers import AutoConfig

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.architectures.probe import experts_geometry
from rq_compile.architectures.without_engine import WITHOUT_ENGINE
from rq_compile.calibration import calibrate as calibrate_module
from rq_compile.calibration.memory import Way
from rq_compile.errors import UserError
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.quantization.quantizer import stored
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets import onnxruntime as target

POPULAR = ("qwen3_5_moe", "gemma4", "gpt_oss", "glm4_moe", "nemotron_h", "qwen3_next", "lfm2_moe")
OTHERS = 3
LOWERINGS = ("native", "batched")


def selected() -> list[str]:
    asked = os.environ.get("RQ_MODEL_TYPES", "")
    if asked:
        return list(model_types.SUPPORTED) if asked == "all" else asked.split(",")
    others = sorted(set(model_types.SUPPORTED) - set(POPULAR))
    return [*POPULAR, *random.Random(datetime.date.today().toordinal()).sample(others, OTHERS)]


# Between a sequence alone and together with others if its whole cache grows in place. Most types have the same bits (see
# tests/runtime); mimo_v2_flash differs by up to 1.1e-6 on AVX2. The op library is not the cause: its plain kernels show it too.
ROUNDING = 1e-5


@pytest.fixture(scope="module", params=selected())
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(model_types.build(request.param, tmp_path_factory.mktemp("types") / request.param))


@pytest.fixture(scope="module")
def exported(model: Model) -> Exported:
    return export_graph(model)


@pytest.fixture(scope="module")
def engines(model: Model, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """With a plan that changes nothing, by lowering."""
    folder, plan = tmp_path_factory.mktemp("engines"), plans.plan_of(model, plans.unchanged)
    for lowering in LOWERINGS:
        target.compile_engine(model, plan, folder / f"{lowering}.onnx", lowering, exported=exported)
    return {lowering: Engine.load(folder / f"{lowering}.onnx", threads=1) for lowering in LOWERINGS}


@pytest.fixture(scope="module")
def reference(model: Model) -> Reference:
    return Reference.load(model)


class Differences:
    """Logits compared within 1e-4; the largest difference stands in pytest's report."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record, self._largest = record, 0.0

    def compare(self, actual: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
        self._largest = max(self._largest, float(np.abs(actual - expected).max()))

    def report(self) -> None:
        self._record("difference", f"{self._largest:.0e}")


@pytest.fixture
def differences(record_property: Callable[[str, object], None]) -> Iterator[Differences]:
    found = Differences(record_property)
    yield found
    found.report()


def quantized_in_place(model: Model) -> Reference:
    """The transformers model, with the experts' weights rounded to the plan's formats."""
    changed = load_model(model)
    for layer in model.layers:
        module: Any = changed.get_submodule(layer.name)
        up = module.gate_up_proj if module.has_gate else module.up_proj
        for expert in range(layer.geometry.experts):
            for weight in (up[expert], module.down_proj[expert]):
                canonical = weight.T if module.is_transposed else weight
                canonical.copy_(torch.from_numpy(stored(canonical.numpy(), plans.format_of(expert))))
    return Reference(changed)


def test_a_plan_that_changes_nothing_changes_no_logit_and_no_token(
    engines: dict[str, Engine], reference: Reference, differences: Differences
) -> None:
    """Prompts that are shorter and longer than sliding windows, and decoding with the cache."""
    for engine in engines.values():
        for batch, length in ((1, 1), (2, 9), (1, 70)):
            ids = plans.tokens(batch, length)
            differences.compare(engine.logits(ids), reference.logits(ids))
        prompt = plans.tokens(7).tolist()
        wanted = list(reference.generate(prompt, 12, stop=False))
        assert list(engine.generate(prompt, 12, stop=False)) == wanted
        if engine.manifest.prefill_chunk is not None:
            in_pieces = Engine(engine.path, engine.manifest.model_copy(update={"prefill_chunk": 3}), 1)
            assert list(in_pieces.generate(prompt, 12, stop=False)) == wanted
        alone_and_together.check(engine, in_place_tolerance=ROUNDING)


def test_the_passes_change_what_they_changed(
    model: Model, engines: dict[str, Engine], record_property: Callable[[str, object], None]
) -> None:
    model_type = model.path.name
    found = {f"{model_type}, {lowering}": engine.manifest.replaced for lowering, engine in engines.items()}
    changes = pass_counts.changes(found, record_property)
    assert not changes, "\n".join([*changes, "If this is intended, run make passes."])


def test_replicated_and_quantized(model: Model, exported: Exported, tmp_path: Path, differences: Differences) -> None:
    plan, expected, ids = (
        plans.plan_of(model, plans.replicated_and_quantized),
        quantized_in_place(model),
        plans.tokens(2, 20),
    )
    for lowering in LOWERINGS:
        target.compile_engine(model, plan, tmp_path / f"{lowering}.onnx", lowering, exported=exported)
        engine = Engine.load(tmp_path / f"{lowering}.onnx", threads=1)
        differences.compare(engine.logits(ids), expected.logits(ids))


def test_calibrated_in_memory_and_layer_by_layer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for whole in (True, False):
        monkeypatch.setattr(calibrate_module, "choose_way", lambda *_, whole=whole, **__: Way(whole, True, "as asked for"))
        results.append(
            calibrate_module.calibrate(
                model, TEXTS, batch_size=4, sequence_length=LENGTH, quantizer="nearest", progress=lambda done, total: None
            )
        )
    same(*results)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "glm4_moe", "lfm2_moe"])
@pytest.mark.parametrize("format", ["fp8", "pack-int4", "nvfp4-fp8"])
def test_in_the_storage_formats_of_published_checkpoints(model_type: str, format: str, tmp_path: Path) -> None:
    """Formats are decoded before transformers' loader is traced, so any family works with any format."""
    plain = model_types.build(model_type, tmp_path / "dequantized")
    made = tiny_storage.store(plain, tmp_path / "stored", tiny_storage.FORMATS[format])
    opened = Model.open(made)
    assert opened.checkpoint.quantization is not None
    ids = plans.tokens(2, 9)
    expected = Reference.load(Model.open(plain)).logits(ids)
    np.testing.assert_allclose(Reference.load(opened).logits(ids), expected, atol=1e-5, rtol=0)
    layer = opened.layers[0]
    one, other = opened.expert(layer, 1), Model.open(plain).expert(layer, 1)
    np.testing.assert_allclose(one.up.astype(np.float32), other.up.astype(np.float32), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", model_types.REFUSED)
def test_what_cannot_be_compiled_is_refused(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=model_types.REFUSED[model_type]):
        export_graph(Model.open(model_types.build(model_type, tmp_path / model_type)))


@pytest.mark.parametrize("model_type", WITHOUT_ENGINE)
def test_it_is_said_before_any_work(model_type: str, tmp_path: Path) -> None:
    """Of those that are refused only when they are exported."""
    folder = model_types.build(model_type, tmp_path / model_type)
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text("a b c " * 40)
    sentence = f"no engine can be made of a {model_type}: {WITHOUT_ENGINE[model_type]}"
    found = json.loads(run_command("inspect", folder, "--json").stdout)
    assert (found["compiles"], found["why_not"]) == (False, sentence)
    assert found["layers"]
    text = ("--text", tmp_path / "text.txt")
    calibration = run_command(
        "calibrate", folder, *text, "-o", tmp_path / "c.json", "--dry-run", "--json", "--sequence-length", 16
    )
    assert sentence in json.loads(calibration.stdout)["remarks"][0], calibration.stderr
    compilation = run_command("compile", folder, *text, "-o", tmp_path / "e.onnx")
    assert (compilation.exit_code, compilation.stdout) == (1, "")
    assert compilation.stderr.endswith(f"error: {folder}: {sentence}; use a family of docs/families.md\n")


def test_experts_that_compute_something_else_are_refused() -> None:
    """A norm after each expert, which our flags cannot describe, is found by running the module."""
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    config: Any = AutoConfig.for_model("muse_spark").get_text_config()
    with torch.device("meta"):
        module = MuseSparkExperts(config)
    with pytest.raises(UserError, match="a norm after each expert"):
        experts_geometry(module, "experts", experts=8, top_k=2, hidden=64, intermediate=32)


def test_a_gate_that_is_bounded_after_its_activation_is_refused(tmp_path: Path) -> None:
    """Step-3.7's last layers."""
    with pytest.raises(UserError, match="does not compute experts"):
        Model.open(model_types.build("step3p7", tmp_path / "step3p7", text_config={"swiglu_limits": [0, 0, 0, 7]}))


@pytest.mark.parametrize("gate", [1.0, 6.0, 40.0])
def test_the_limit_of_an_activation_is_found(gate: float) -> None:
    config: Any = AutoConfig.for_model("deepseek_v4", swiglu_limit=gate)
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    with torch.device("meta"):
        module = DeepseekV4Experts(config)
    geometry = experts_geometry(module, "experts", experts=8, top_k=2, hidden=64, intermediate=32)
    assert (geometry.activation, geometry.limit) == ("limited_swiglu", gate)


def test_every_moe_type_of_transformers_is_listed(tmp_path: Path) -> None:
    """A new model type in another version of transformers should be noticed by this test, not by a user."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    sources = Path(transformers.__file__).parent / "models"
    folders = {path.parent.name for path in sources.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()}
    language = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known = {*model_types.SUPPORTED, *model_types.REFUSED, *model_types.NOT_TRIED}
    missing = {folder for folder in folders & language if folder not in known and f"{folder}_text" not in known}
    assert missing == set()


def test_the_table_of_passes_has_every_type_and_names_what_changed() -> None:
    rows = pass_counts.table()
    expected = {f"{model_type}, {lowering}" for model_type in model_types.SUPPORTED for lowering in LOWERINGS}
    assert set(rows) == expected
    row, counts = "glm4_moe, native", rows["glm4_moe, native"]
    assert counts["norms fused"] > 0
    changed = {**counts, "norms fused": 0, "norms not fused: because": 3}
    assert pass_counts.differences(row, counts, counts) == []
    assert pass_counts.differences(row, counts, changed) == [
        f"glm4_moe, native: norms fused: {counts['norms fused']} in the table, 0 in the engine",
        "glm4_moe, native: norms not fused: because: not in the table, 3 in the engine",
    ]
    assert pass_counts.differences(row, changed, counts)[-1].endswith("3 in the table, not in the engine")


def test_the_table_of_families_has_what_is_tested() -> None:
    document = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    table = document.partition(families_table.BEGIN)[2].partition(families_table.END)[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(model_types.SUPPORTED)
    assert "failed" not in table
    refused = document.partition("## Refused")[2]
    assert [model_type for model_type in model_types.REFUSED if f"`{model_type}`" not in refused] == []
