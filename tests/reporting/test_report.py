"""The report: the figures that it takes from its documents, and the files that it rejects."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import names, refused
from html_page import Read
from reported import Command, large, whole
from scipy.stats import spearmanr

from rq_compile.engine.manifest import Manifest
from rq_compile.evaluation.schema import Bench, Evaluation
from rq_compile.planning.dense import FORMATS
from rq_compile.reporting.maps import BOUNDS, legend, maps, tone
from rq_compile.reporting.page import page, size

TIMES = "\N{MULTIPLICATION SIGN}"


def test_the_calibration_adds_whether_texts_agree(rq_compile: Command, stages: Path, out: Path) -> None:
    report = ("report", stages / "model.onnx", "-o", out / "report.html")
    assert rq_compile(*report).exit_code == 0
    assert ">agreement</th>" not in (out / "report.html").read_text()
    assert rq_compile(*report, "--calibration", stages / "calibration.json").exit_code == 0
    shown = (out / "report.html").read_text()
    for layer in json.loads((stages / "calibration.json").read_text())["layers"]:
        loads = np.array(layer["text_loads"])
        if len(loads) == 1:
            loads = np.array([half.sum(0) for half in np.array_split(np.array(layer["batch_loads"]), 2)])
        assert f"<td>{spearmanr(loads[0], loads[1]).statistic:.2f}</td></tr>" in shown


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("model.json", ["model.json is a file of kind engine", "give a calibration"]),
        ("plan.json", ["plan.json is a file of kind plan", "give a calibration"]),
        ("other.json", ["other.json is not the calibration that model.onnx was planned with", "leave it out"]),
        ("none.json", ["cannot read calibration", "none.json"]),
    ],
)
def test_another_calibration(rq_compile: Command, stages: Path, out: Path, tmp_path: Path, given: str, words: list[str]) -> None:
    (tmp_path / "other.json").write_text((stages / "calibration.json").read_text() + " ")
    path = (stages if (stages / given).exists() else tmp_path) / given
    refused(rq_compile("report", stages / "model.onnx", "--calibration", path, "-o", out / "report.html"), 2, *words)
    assert names(out) == []


def test_the_command_writes_the_figures_of_the_documents(
    rq_compile: Command, stages: Path, measured: Path, documents: tuple[Manifest, Evaluation, Bench], out: Path
) -> None:
    manifest, evaluation, bench = documents
    given = ("--evaluation", measured / "evaluation.json", "--bench", measured / "bench.json")
    result = rq_compile("report", stages / "model.onnx", *given, "-o", out / "report.html", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["lis_source"] == "measured"
    assert said["lis_after"] == pytest.approx(np.mean([layer.lis_after for layer in evaluation.total.layers]))
    assert said["expert_bytes_after"] == manifest.expert_bytes
    assert said["decode"] == bench.ratio_decode

    assert bench.machine
    assert evaluation.total.perplexity_engine
    assert evaluation.total.perplexity_reference
    text = Read((out / "report.html").read_text()).text
    for figure in (
        f"{said['lis_before']:.2f} → {said['lis_after']:.2f}",
        f"{manifest.expert_bytes / manifest.plan.bytes_before:.2f} {TIMES} ",
        f"{100 * (evaluation.total.perplexity_engine / evaluation.total.perplexity_reference - 1):+.2f} %",
        f"{bench.ratio_prefill:.1f} {TIMES} / {bench.ratio_decode:.1f} {TIMES}",
        bench.machine,
        manifest.plan.fingerprint,
        manifest.weights.sha256,
        *manifest.plan.remarks,
        *(text.name for text in evaluation.texts),
        *(f"{text.perplexity_engine:.3f}" for text in evaluation.texts),
        *(f"{layer.lis_before:.3f} → {layer.lis_after:.3f}" for text in evaluation.texts for layer in text.layers),
        *(f"{layer.predicted.lis_before:.3f} → {layer.predicted.lis_after:.3f}" for layer in manifest.plan.layers),
    ):
        assert figure in text
    assert "not measured" not in text
    assert text.count("LIS, measured") == 1


def test_what_was_not_measured_it_says_with_the_command(rq_compile: Command, stages: Path, out: Path) -> None:
    result = rq_compile("report", stages / "model.onnx", "-o", out / "report.html", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    text = Read((out / "report.html").read_text()).text
    assert "LIS, predicted" in text
    assert text.count("not measured how to") == 2
    assert "rq-compile evaluate model.onnx --reference olmoe --text FILE --json > evaluation.json" in text
    assert "rq-compile bench model.onnx --against olmoe --json > bench.json" in text


def test_an_engine_timed_alone_or_against_another(
    rq_compile: Command, stages: Path, measured: Path, documents: tuple[Manifest, Evaluation, Bench], out: Path
) -> None:
    arguments = ("report", stages / "model.onnx", "--bench", measured / "alone.json", "-o", out / "report.html", "-q")
    assert rq_compile(*arguments).exit_code == 0
    text = Read((out / "report.html").read_text()).text
    assert "timed alone" in text
    assert "tokens/s decode" in text
    manifest, _, bench = documents
    assert bench.other is not None
    for name, told in (
        ("stock.onnx", "stock.onnx, another engine"),
        ("olmoe", "the original, olmoe, in transformers"),
        ("olmoe-tuned", "olmoe-tuned, in transformers"),
    ):
        other = bench.model_copy(update={"other": bench.other.model_copy(update={"name": name})})
        text = Read(page("model.onnx", manifest, None, other)).text
        assert told in text
        assert ("the original, " in text) == (name == "olmoe")


def test_format_of_the_rest_and_licence(documents: tuple[Manifest, Evaluation, Bench]) -> None:
    manifest = documents[0]
    for changes, told in (
        ({"dense_format": "stored"}, "its matrices in the checkpoint's format."),
        ({"dense_format": "int8"}, "its matrices in int8."),
        ({"licence": "mit"}, "Licence mit, as the model card says"),
    ):
        assert told in Read(page("model.onnx", manifest.model_copy(update=changes), None, None)).text


def test_loads_that_the_plan_does_not_know(documents: tuple[Manifest, Evaluation, Bench]) -> None:
    manifest = documents[0]
    first, *others = manifest.plan.layers
    slots = [slot.model_copy(update={"load": None}) for slot in first.slots]
    plan = manifest.plan.model_copy(update={"layers": [first.model_copy(update={"slots": slots}), *others]})
    read = Read(page("model.onnx", manifest.model_copy(update={"plan": plan}), None, None))
    assert f"does not know the load of every slot of layer {first.index}:" in read.text
    assert "layer 0, expert 0: load not known" in read.text
    assert maps(plan).unknown == [0]
    assert maps(manifest.plan).unknown == []


def test_ranks(documents: tuple[Manifest, Evaluation, Bench]) -> None:
    manifest, evaluation, _ = documents
    assert "rank has" not in Read(page("model.onnx", manifest, evaluation, None)).text
    for before, told in ((1.5, "Over 4 ranks the busiest rank has 1.50 → 1.00 times"), (None, "not known")):
        changes = {"rank_imbalance_before": before, "rank_imbalance_after": 1.0}
        layers = [
            layer.model_copy(update={"predicted": layer.predicted.model_copy(update=changes)}) for layer in manifest.plan.layers
        ]
        plan = manifest.plan.model_copy(update={"ranks": 4, "layers": layers})
        text = Read(page("model.onnx", manifest.model_copy(update={"plan": plan}), evaluation, None)).text
        assert told in text
        assert "busiest rank over the mean" in text
        assert ("rank has" in text) == (before is not None)


def test_before_is_the_sum_over_an_experts_slots(documents: tuple[Manifest, Evaluation, Bench]) -> None:
    plan = documents[0].plan
    told = maps(plan).before.tips
    copied = False
    for layer in plan.layers:
        for expert in range(layer.geometry.experts):
            held = [slot.load or 0.0 for slot in layer.slots if slot.expert == expert]
            copied |= len(held) > 1
            load = sum(held) * layer.geometry.experts
            assert f"layer {layer.index}, expert {expert}: {load:.2f} x the mean load" in told
    assert copied


def test_every_cell_has_its_place_and_tone(documents: tuple[Manifest, Evaluation, Bench]) -> None:
    made = maps(large(documents[0], layers=40, experts=100).plan)
    for grid in (made.before, made.after, made.formats):
        shapes = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", "".join(grid.paths.values()))
        x, y, width, height = np.asarray(shapes, float).T
        assert (width * height).sum() == pytest.approx(100 * 40, rel=2e-3)
        assert (x + width).max() == pytest.approx(100, abs=0.01)
        assert set(y) == set(range(40))
    assert set(made.after.paths) <= {"t1", "t2", "t3", "t4"}  # no slot has more than the mean
    assert "t8" in made.before.paths


def test_tones_are_those_of_the_legend() -> None:
    assert [tone(load) for load in (0, 0.1, 1, 4.99, 5, 60)] == ["t0", "t1", "t4", "t7", "t7", "t8"]
    assert dict(legend())[tone(1)] == "0.8\N{EN DASH}1.25"
    assert [name for name, _ in legend()] == [f"t{number}" for number in range(len(BOUNDS) + 1)]


def test_modules_of_a_plan_for_the_whole_engine(documents: tuple[Manifest, Evaluation, Bench], pages: dict[str, Path]) -> None:
    manifest, *_ = whole(documents[0])
    text = Read(pages["whole"].read_text()).text
    kinds = {module.kind for module in manifest.plan.dense}
    for kind in kinds:
        held = [module for module in manifest.plan.dense if module.kind == kind]
        stored, planned = sum(module.bytes_stored for module in held), sum(module.bytes for module in held)
        of = ", ".join(f"{count} {format}" for format in FORMATS if (count := sum(m.format == format for m in held)))
        assert " ".join([kind, of, size(stored), size(planned)]) in text
    assert "The budget is 0.80 MB for the weights of the whole engine" in text
    assert "Non-expert weights, whose formats" not in Read(pages["full"].read_text()).text


# Errors


@pytest.mark.parametrize(
    ("option", "changes", "words"),
    [
        ("evaluation", {"engine": "other.onnx"}, ["evaluation of other.onnx, not of model.onnx", "rq-compile evaluate"]),
        ("evaluation", {"reference": "mixtral"}, ["of the model mixtral, not of the model olmoe"]),
        ("evaluation", {"expert_bytes_after": 7}, ["expert bytes 7"]),
        (
            "bench",
            {"engine": {"name": "other.onnx", "prefill": 1.0, "decode": 1.0}},
            ["benchmark of other.onnx", "rq-compile bench"],
        ),
        ("bench", {"weights_sha256": "0" * 64}, ["benchmark of an earlier model.onnx, not of model.onnx"]),
        ("bench", {"rounds": "many"}, ["is not a valid benchmark: rounds"]),
    ],
)
def test_documents_of_another_engine(
    rq_compile: Command, stages: Path, measured: Path, out: Path, option: str, changes: dict[str, Any], words: list[str]
) -> None:
    document = out.parent / "changed.json"
    document.write_text(json.dumps(json.loads((measured / f"{option}.json").read_text()) | changes))
    arguments = ("report", stages / "model.onnx", f"--{option}", document, "-o", out / "report.html")
    refused(rq_compile(*arguments), 2, *words)
    assert names(out) == []


@pytest.mark.parametrize("lost", ["model.onnx", "model.json", "model.onnx.data", "bench.json"])
def test_what_it_is_made_from_is_not_overwritten(
    rq_compile: Command, stages: Path, measured: Path, tmp_path: Path, lost: str
) -> None:
    for path in (*stages.glob("model.*"), measured / "bench.json"):
        shutil.copyfile(path, tmp_path / path.name)
    before = (tmp_path / lost).read_bytes()
    result = rq_compile("report", tmp_path / "model.onnx", "--bench", tmp_path / "bench.json", "-o", tmp_path / lost)
    refused(result, 2, "would overwrite", "choose another output with -o")
    assert (tmp_path / lost).read_bytes() == before


def test_files_that_are_missing(rq_compile: Command, stages: Path, out: Path, tmp_path: Path) -> None:
    refused(rq_compile("report", tmp_path / "no.onnx", "-o", out / "report.html"), 2, "no such engine")
    refused(rq_compile("report", stages / "model.onnx", "-o", out / "no" / "report.html"), 2, "there is no folder")
    refused(
        rq_compile("report", stages / "model.onnx", "--bench", "no.json", "-o", out / "report.html"),
        2,
        "cannot read benchmark no.json",
    )
    shutil.copy(stages / "model.onnx", tmp_path)
    refused(rq_compile("report", tmp_path / "model.onnx", "-o", out / "report.html"), 2, "no manifest")
    assert names(out) == []
