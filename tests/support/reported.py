"""What the report is made from, and pages of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from sweeps import sweep_of

from rq_compile.calibration.schema import Calibration
from rq_compile.engine.manifest import Manifest
from rq_compile.evaluation.schema import Bench, Evaluation
from rq_compile.files import read_document
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.planning.sweep import Sweep, make_sweep
from rq_compile.reporting.page import page

Command = Callable[..., Result]
HOSTILE = "<script>pwned = 1</script>\"'><img src=x onerror=pwned=1>&amp;"
FROZEN = Path(__file__).parents[1] / "frozen"


@pytest.fixture(scope="session")
def measured(
    rq_compile: Command, stages: Path, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the output of `evaluate` and `bench` for the engine of ``stages``."""
    folder, engine, model = tmp_path_factory.mktemp("measured"), stages / "model.onnx", tiny_checkpoint("olmoe")
    second = folder / "other.txt"
    second.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    evaluate = ("evaluate", engine, "--reference", model, "--text", stages / "text.txt", "--text", second)
    for name, arguments in (
        ("evaluation.json", (*evaluate, "--sequence-length", 64)),
        ("bench.json", ("bench", engine, "--against", model, "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1)),
        ("alone.json", ("bench", engine, "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1)),
    ):
        result = rq_compile(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        (folder / name).write_text(result.stdout)
    return folder


@pytest.fixture(scope="session")
def documents(stages: Path, measured: Path) -> tuple[Manifest, Evaluation, Bench]:
    return (
        Manifest.model_validate_json((stages / "model.json").read_bytes()),
        Evaluation.model_validate_json((measured / "evaluation.json").read_bytes()),
        Bench.model_validate_json((measured / "bench.json").read_bytes()),
    )


@pytest.fixture(scope="session")
def pages(
    documents: tuple[Manifest, Evaluation, Bench], stages: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The full page, one with a sweep, one without measurements, one for a large model, one of a plan for the whole engine, and
    one with hostile names."""
    manifest, evaluation, bench = documents
    folder = tmp_path_factory.mktemp("pages")
    named = manifest.model_copy(update={"tool": HOSTILE, "plan": manifest.plan.model_copy(update={"model": HOSTILE})})
    texts = [text.model_copy(update={"name": HOSTILE}) for text in evaluation.texts]
    contents = {
        "full": page("model.onnx", manifest, evaluation, bench),
        "bare": page("model.onnx", manifest, None, None),
        "swept": page("model.onnx", manifest, evaluation, bench, sweep_of(manifest, stages / "calibration.json")),
        "large": page("model.onnx", large(manifest), None, bench),
        "whole": page("model.onnx", *whole(manifest)),
        "hostile": page(HOSTILE, named, evaluation.model_copy(update={"texts": texts, "reference": HOSTILE}), bench),
        "hostile bare": page(HOSTILE, named, None, None),
    }
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(content)
    return {name: folder / f"{name}.html" for name in contents}


def whole(manifest: Manifest) -> tuple[Manifest, None, None, Sweep]:
    """An engine whose plan decides the formats of modules with hostile names, and a sweep over sizes of the engine."""
    calibration = read_document(Calibration, FROZEN / "calibration.v2.whole.json")
    how: dict[str, Any] = {"policy": "optimal", "ranks": 1, "target": "cpu"}
    plan = make_plan(calibration, memory=None, engine_bytes=800_000, **how)
    named = [module.model_copy(update={"name": f"{HOSTILE} {module.name}"}) for module in plan.dense]
    sweep = make_sweep(calibration, engine_bytes=2_000_000, **how)
    return manifest.model_copy(update={"plan": plan.model_copy(update={"dense": named})}), None, None, sweep


def large(manifest: Manifest, layers: int = 64, experts: int = 256) -> Manifest:
    """The engine of a model of this size, with copies of the busiest experts until no slot has more than the mean."""
    random = np.random.default_rng(1)
    first = manifest.plan.layers[0]
    made = []
    for index in range(layers):
        load = random.dirichlet(np.full(experts, 0.3))
        copies = np.maximum(1, np.ceil(load * experts)).astype(int)
        slots = [
            Slot(expert=expert, format="int8" if load[expert] * experts > 0.3 else "int4", load=load[expert] / copies[expert])
            for expert in range(experts)
            for _ in range(copies[expert])
        ]
        geometry = first.geometry.model_copy(update={"experts": experts})
        bytes_after = sum(geometry.expert_bytes(slot.format) for slot in slots)
        stored = {"bytes_before": experts * geometry.expert_bytes("bf16"), "bytes_after": bytes_after}
        predicted = first.predicted.model_copy(update={"lis_before": experts * load.max(), "lis_after": 1.0, **stored})
        made.append(LayerPlan(name=f"layer.{index}", index=index, geometry=geometry, slots=slots, predicted=predicted))
    return manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"layers": made})})
