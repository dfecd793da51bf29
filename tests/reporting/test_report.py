"""The report: its contents, the files it rejects, and how a browser shows it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Page, browser
from click.testing import Result
from command_line import names, refused
from html_page import Read
from scipy.stats import spearmanr
from sweeps import sweep_of

from rq_compile.calibration.schema import Calibration
from rq_compile.engine.manifest import Manifest
from rq_compile.evaluation.schema import Bench, Evaluation
from rq_compile.files import read_document
from rq_compile.planning.dense import FORMATS
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.planning.sweep import Sweep, make_sweep
from rq_compile.reporting.maps import BOUNDS, legend, maps, tone
from rq_compile.reporting.page import page, size

Command = Callable[..., Result]
HOSTILE = "<script>pwned = 1</script>\"'><img src=x onerror=pwned=1>&amp;"
TIMES = "\N{MULTIPLICATION SIGN}"
FROZEN = Path(__file__).parents[1] / "frozen"


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def documents(stages: Path, measured: Path) -> tuple[Manifest, Evaluation, Bench]:
    return (
        Manifest.model_validate_json((stages / "model.json").read_bytes()),
        Evaluation.model_validate_json((measured / "evaluation.json").read_bytes()),
        Bench.model_validate_json((measured / "bench.json").read_bytes()),
    )


@pytest.fixture(scope="module")
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


# Contents


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


# Structure


@pytest.mark.parametrize("name", ["full", "swept", "bare", "large", "whole", "hostile", "hostile bare"])
def test_it_is_one_file_without_script(pages: dict[str, Path], name: str) -> None:
    content = pages[name].read_text()
    read = Read(content)
    assert not {"script", "img", "iframe", "object"} & read.tags
    assert not [attribute for attribute, _ in read.attributes if attribute.startswith("on") or attribute == "src"]
    assert all(value[0] == "#" or value == "data:," for attribute, value in read.attributes if attribute == "href")
    assert not re.search(r"url\(|@import", content.split("</style>")[0])
    assert len(content) < 2_500_000


def test_hostile_names_are_shown_as_they_are(pages: dict[str, Path]) -> None:
    shown = " ".join(HOSTILE.split())
    assert Read(pages["hostile"].read_text()).text.count(shown) > 5


def test_the_same_documents_give_the_same_bytes(documents: tuple[Manifest, Evaluation, Bench], pages: dict[str, Path]) -> None:
    assert page("model.onnx", *documents) == pages["full"].read_text()


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


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("name", ["full", "swept", "bare", "large", "whole", "hostile"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_without_a_complaint_and_fits(tab: Page, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    tab.open(pages[name], width=width, scheme=scheme)
    assert tab.complaints == []
    assert tab.requests == [pages[name].as_uri()]
    assert tab.evaluate("typeof pwned") == "undefined"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Only the contents of scrollable frames, which the keyboard can reach too, extend beyond the edge.
    outside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .unseen') && "
    assert tab.evaluate(outside + f"e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 80))") == []
    assert tab.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex == 0 && e.ariaLabel)")
    assert tab.evaluate("[...document.querySelectorAll('svg')].every(e => e.ariaHidden == 'true' || e.ariaLabel)")
    if width == 390 and name == "large":
        assert tab.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.map .scroll'))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_to_read(tab: Page, pages: dict[str, Path], scheme: str) -> None:
    tab.open(pages["full"], scheme=scheme)
    paper = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for part in ("body", ".lede", ".figures b", ".figures dd", ".eyebrow", "summary", "thead th", ".facts dt"):
        assert contrast(luminance(tab.evaluate(f"getComputedStyle(document.querySelector('{part}')).color")), paper) >= 4.5, part
    pairs = tab.evaluate(
        "[...document.querySelectorAll('.numbers text')].map(e => [getComputedStyle(e).fill, getComputedStyle("
        "e.closest('.cells').querySelector('.' + e.classList[0].slice(3))).fill, e.classList[0]])"
    )
    assert len(pairs) > 10
    for text, cell, kind in pairs:
        assert contrast(luminance(text), luminance(cell)) >= 4.5, kind


def test_every_tone_is_stronger_than_the_one_before(tab: Page, pages: dict[str, Path]) -> None:
    """Colour is not the only cue: in shades of grey, the order is the same."""
    for scheme, sign in (("light", -1), ("dark", 1)):
        tab.open(pages["full"], scheme=scheme)
        tones = tab.evaluate(
            "[...document.querySelectorAll('.legend')[0].querySelectorAll('rect')].map(e => getComputedStyle(e).fill)"
        )
        values = [sign * luminance(fill) for fill in tones]
        assert len(values) == len(BOUNDS) + 1
        assert values[1:] == sorted(values[1:])


def test_printed_it_hides_nothing(tab: Page, pages: dict[str, Path]) -> None:
    tab.open(pages["full"])
    height = "document.querySelector('details table').getBoundingClientRect().height"
    visible = "document.querySelector('details table').checkVisibility()"
    assert not tab.evaluate(visible)
    tab.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.evaluate(visible)
        assert tab.evaluate(height) > 50
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")


def luminance(colour: str) -> float:
    """The luminance of ``rgb(...)``, as defined by WCAG 2."""
    parts = np.asarray(re.findall(r"[\d.]+", colour)[:3], float) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)
