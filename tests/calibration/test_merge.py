"""Calibrations of different texts add up to that of all texts."""

import json
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated import LENGTH, letters
from command_line import refused
from command_line import run_command as run
from hypothesis import given
from hypothesis import strategies as st

import rq_compile as rq
from rq_compile.architectures.model import Model
from rq_compile.calibration import measure
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.merge import factors, merge, merge_statistics, whole
from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.calibration.statistics import Statistics, write_with_statistics
from rq_compile.errors import UserError
from rq_compile.files import read_document, sha256, write_document
from rq_compile.planning.schema import Plan

TEXTS = {f"{name}.txt": letters(count, seed) for seed, (name, count) in enumerate({"one": 60, "two": 431, "three": 200}.items())}
Calibrated = tuple[Calibration, dict[str, np.ndarray]]
Tiny = Callable[[str], Path]


def calibrated(model: Path, *names: str, **options: Any) -> Calibrated:
    given: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "progress": lambda done, total: None} | options
    return calibrate(Model.open(model), {name: TEXTS[name] for name in names}, **given)


def merged(*several: Calibrated) -> Calibrated:
    made = merge({Path(f"{number}.json"): calibration for number, (calibration, _) in enumerate(several)})
    statistics = [(1.0, found) for _, tensors in several if (found := Statistics.of(tensors))]
    return made, merge_statistics(made.layers, statistics, made.dense) if statistics else {}


def assert_adds_up(found: Calibrated, expected: Calibrated, errors: float, scores: float) -> None:
    for name in ("texts", "tokens", "measured_tokens", "padding_tokens", "batch_size", "tokenizer", "fingerprint"):
        assert getattr(found[0], name) == getattr(expected[0], name), name
    for one, other in zip(found[0].layers, expected[0].layers, strict=True):
        for name in ("load", "text_loads", "batch_loads", "dropped", "geometry", "estimated"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.sums
        assert other.sums
        assert one.sums.pairs == other.sums.pairs
        np.testing.assert_allclose(one.sums.energy, other.sums.energy, rtol=1e-5)
        np.testing.assert_allclose(one.sums.output_square, other.sums.output_square, rtol=1e-5)
        np.testing.assert_allclose(one.wanda, other.wanda, rtol=scores)
        assert (one.sensitivity or 0) == pytest.approx(other.sensitivity or 0, rel=1e-4)
        for format, error in other.error.items():
            np.testing.assert_allclose(one.error[format], error, rtol=2e-3 if format in ("fp16", "bf16") else errors)
    for module, whole_module in zip(found[0].dense, expected[0].dense, strict=True):
        assert (module.name, module.matrices) == (whole_module.name, whole_module.matrices)
        # Streams behind attention, and errors, are measured on a batch of each part, and on one of all.
        assert module.square == pytest.approx(whole_module.square, rel=0.3 if module.kind == "attention" else 1e-5)
        assert module.error == pytest.approx(whole_module.error, rel=0.6)
    assert found[1].keys() == expected[1].keys()
    for name, moment in expected[1].items():
        np.testing.assert_allclose(found[1][name], moment, rtol=0, atol=1e-5 * np.abs(moment).max())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_two_texts_add_up_to_both(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """With rounding to the nearest, errors are sums; with GPTQ, each part was rounded with its own moments."""
    monkeypatch.setattr(measure, "MAX_PAIRS", 10_000)
    model = tiny_checkpoint(family)
    for quantizer, errors in (("nearest", 2e-3), ("gptq", 0.6)):
        run = partial(calibrated, model, quantizer=quantizer)
        assert_adds_up(merged(run("one.txt"), run("two.txt")), run("one.txt", "two.txt"), errors, scores=0.1)


def test_the_order_does_not_matter(tiny_checkpoint: Tiny) -> None:
    parts = [calibrated(tiny_checkpoint("olmoe"), name) for name in TEXTS]
    expected = merged(*parts)
    for order in permutations(parts):
        for found in (merged(*order), merged(merged(*order[:2]), order[2]), merged(order[0], merged(*order[1:]))):
            by_name = sorted(
                zip(found[0].texts, *(layer.text_loads for layer in found[0].layers), strict=True), key=lambda row: row[0].name
            )
            known = zip(expected[0].texts, *(layer.text_loads for layer in expected[0].layers), strict=True)
            assert by_name == sorted(known, key=lambda row: row[0].name)
            for one, other in zip(found[0].layers, expected[0].layers, strict=True):
                assert one.load == other.load
                assert one.sums
                assert other.sums
                assert one.sums.pairs == other.sums.pairs
                np.testing.assert_allclose(one.wanda, other.wanda, rtol=1e-5)
                for format in other.error:
                    np.testing.assert_allclose(one.error[format], other.error[format], rtol=1e-5)
            for name, moment in expected[1].items():
                np.testing.assert_allclose(found[1][name], moment, rtol=0, atol=1e-6 * np.abs(moment).max())


def test_an_expert_that_no_part_reached_enough_is_measured_by_all(tiny_checkpoint: Tiny) -> None:
    """Each part estimates some experts that are measured by all parts together."""
    parts = [calibrated(tiny_checkpoint("olmoe"), name) for name in TEXTS]
    estimated = [{(i, e) for i, layer in enumerate(part.layers) for e in layer.estimated} for part, _ in (*parts, merged(*parts))]
    assert estimated[3] < estimated[0]


def changed(calibration: Calibration, **changes: Any) -> Calibration:
    return calibration.model_copy(update=changes)


def changed_layer(calibration: Calibration, change: Callable[[LayerCalibration], LayerCalibration]) -> Calibration:
    return changed(calibration, layers=[change(calibration.layers[0]), *calibration.layers[1:]])


def other_block(layer: LayerCalibration) -> LayerCalibration:
    return layer.model_copy(update={"geometry": layer.geometry.model_copy(update={"block": 32})})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: changed(c, fingerprint="0" * 64), r"the model of a\.json and b\.json is not the same; calibrate one"),
        (lambda c: changed(c, tokenizer="0" * 64), "the tokenizer of .* is not the same;"),
        (lambda c: changed(c, quantizer="nearest"), r"--quantizer of .* is not the same \(gptq and nearest\)"),
        (lambda c: changed(c, wanda_fraction=0.25), r"--wanda-fraction of .* \(0\.5 and 0\.25\)"),
        (lambda c: changed(c, batch_size=2), r"--batch-size of .* \(4 and 2\)"),
        (lambda c: changed(c, sequence_length=8), r"--sequence-length of .* \(12 and 8\)"),
        (lambda c: changed_layer(c, other_block), r"--block of .* \(128 and 32\)"),
        (lambda c: changed(c, layers=c.layers[1:]), "have different layers"),
        (
            lambda c: changed_layer(c, lambda layer: layer.model_copy(update={"sums": None})),
            r"b\.json was written before schema ver",
        ),
        (
            lambda c: changed(changed_layer(c, lambda layer: layer.model_copy(update={"sums": None})), measured_tokens=0),
            r"b\.json has loads that a server recorded, so it has no sums to add; calibrate again",
        ),
        (
            lambda c: changed(c, texts=[text.model_copy(update={"name": "one.txt"}) for text in c.texts]),
            r"two texts are named one\.txt",
        ),
    ],
)
def test_refuses_what_does_not_add_up(tiny_checkpoint: Tiny, change: Callable[[Calibration], Calibration], said: str) -> None:
    one, other = (calibrated(tiny_checkpoint("olmoe"), name)[0] for name in ("one.txt", "two.txt"))
    with pytest.raises(UserError, match=said) as refusal:
        merge({Path("a.json"): one, Path("b.json"): change(other)})
    assert refusal.value.exit_status == 2


def test_on_the_command_line(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A plan from the merged calibration compiles with the merged statistics."""
    model = tiny_checkpoint("olmoe")
    parts = []
    for name in ("one", "two"):
        parts.append(tmp_path / f"{name}.json")
        write_with_statistics(*calibrated(model, f"{name}.txt"), parts[-1])
    assert run("merge", *parts, "-o", tmp_path / "both.json").exit_code == 0
    both = read_document(Calibration, tmp_path / "both.json")
    assert both.statistics is not None
    assert Statistics.beside(tmp_path, both.statistics).input_moment(both.layers[0].name).values.shape == (32, 32)
    assert run("plan", tmp_path / "both.json", "--memory", "0.5", "-o", tmp_path / "plan.json").exit_code == 0
    compiled = run(model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "engine.onnx")
    assert compiled.exit_code == 0, compiled.stderr
    refused(run("merge", parts[0], "-o", tmp_path / "c.json"), 2, "merge needs at least two different calibrations")
    refused(run("merge", parts[0], parts[0], "-o", tmp_path / "c.json"), 2, "give each once")
    refused(run("merge", parts[0], tmp_path / "both.json", "-o", tmp_path / "c.json"), 2, "ran one.txt, which would count twice")
    refused(run("merge", *parts, "-o", tmp_path / "c.safetensors"), 2, "end it in .json")
    assert not (tmp_path / "c.json").exists()


def test_files_of_schema_version_1_are_read(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    calibration, _ = calibrated(tiny_checkpoint("olmoe"), "one.txt", quantizer="nearest")
    content = json.loads(calibration.model_dump_json())
    del content["tokenizer"]
    for layer in content["layers"]:
        del layer["sums"]
    (tmp_path / "old.json").write_text(json.dumps(content | {"schema_version": 1}))
    assert run("plan", tmp_path / "old.json", "-o", tmp_path / "plan.json").exit_code == 0
    write_document(calibrated(tiny_checkpoint("olmoe"), "two.txt", quantizer="nearest")[0], tmp_path / "new.json")
    for order in (("old", "new"), ("new", "old")):
        paths = [tmp_path / f"{name}.json" for name in order]
        refused(run("merge", *paths, "-o", tmp_path / "c.json"), 2, "old.json was written before schema version 2")


def test_weights_are_shares_of_the_traffic(tiny_checkpoint: Tiny) -> None:
    """With weights in proportion to the tokens, as without weights; with others, every measurement moves by the same factors."""
    one, two = (calibrated(tiny_checkpoint("olmoe"), name)[0] for name in ("one.txt", "two.txt"))
    files = {Path("one.json"): one, Path("two.json"): two}
    plain, weighed = merge(files), merge(files, factors([one, two], [3.0, None]))
    for layer, same in zip(plain.layers, merge(files, factors([one, two], [one.tokens / two.tokens, 1.0])).layers, strict=True):
        assert layer.load == same.load
        np.testing.assert_allclose(layer.error["int4"], same.error["int4"], rtol=1e-6)
    tokens = one.tokens + two.tokens
    counted = [text.weight * text.tokens / tokens for text in weighed.texts]
    np.testing.assert_allclose(counted, [0.75, 0.25], rtol=1e-12)
    assert weighed.tokens == tokens
    for layer, first, second in zip(weighed.layers, one.layers, two.layers, strict=True):
        assert sum(layer.load) == tokens * layer.geometry.top_k
        expected = np.stack([np.array(part.load) / sum(part.load) for part in (first, second)])
        np.testing.assert_allclose(np.array(layer.load) / sum(layer.load), [0.75, 0.25] @ expected, atol=1 / sum(layer.load))
        assert layer.text_loads == [*first.text_loads, *second.text_loads]
        assert layer.sums
        assert first.sums
        assert second.sums
        assert layer.sums.pairs == [a + b for a, b in zip(first.sums.pairs, second.sums.pairs, strict=True)]
        shares = [first.sums.output_square / first.tokens, second.sums.output_square / second.tokens]
        assert layer.sums.output_square / tokens == pytest.approx(0.75 * shares[0] + 0.25 * shares[1])


def test_statistics_are_weighted(tiny_checkpoint: Tiny) -> None:
    parts = [calibrated(tiny_checkpoint("olmoe"), name) for name in ("one.txt", "two.txt")]
    first, second = (Statistics.of(tensors) for _, tensors in parts)
    assert first
    assert second
    found = merge_statistics(parts[0][0].layers, [(0.5, first), (2.0, second)])
    for name, moment in found.items():
        np.testing.assert_allclose(moment, 0.5 * parts[0][1][name] + 2 * parts[1][1][name], rtol=1e-5)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=50))
def test_rounded_counts_keep_their_sum(counts: list[float]) -> None:
    rounded = whole(np.array(counts))
    assert rounded.sum() == round(float(np.sum(counts)))
    assert (np.abs(rounded - counts) <= 1).all()


def test_plans_from_several_calibrations(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """The plan names the merged calibration and its statistics, and compiles."""
    model, files = tiny_checkpoint("olmoe"), [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        write_with_statistics(*calibrated(model, f"{file.stem}.txt"), file)
    plan, merged_file = tmp_path / "plan.json", tmp_path / "plan.calibration.json"
    assert run("plan", f"{files[0]}:3", files[1], "--memory", "0.5", "-o", plan).exit_code == 0
    by_hand = tmp_path / "by-hand.json"
    rq.merge({files[0]: 3, files[1]: 1}, by_hand)
    assert read_document(Calibration, merged_file).layers == read_document(Calibration, by_hand).layers
    assert read_document(Plan, plan).calibration_sha256 == sha256(merged_file)
    assert run(model, "--plan", plan, "-o", tmp_path / "engine.onnx").exit_code == 0
    assert "counted" in run("inspect", merged_file).stdout
    shown = (tmp_path / "a:2.json", "a:2.json")  # a colon in a name is not a weight
    shown[0].write_bytes(files[0].read_bytes())
    shown[0].with_suffix(".safetensors").write_bytes(files[0].with_suffix(".safetensors").read_bytes())
    assert run("plan", shown[0], files[1], "-o", tmp_path / "colon.json").exit_code == 0
    for given_files, said in (
        ((f"{files[0]}:0", files[1]), "is not above 0"),
        ((f"{files[0]}:-1", files[1]), "is not above 0"),
        ((f"{files[0]}:nan", files[1]), "is not above 0"),
        ((f"{files[0]}:inf", files[1]), "is not above 0"),
        ((f"{files[0]}:x", files[1]), "one.json:x"),
        ((f"{files[0]}:2",), "has no effect on a single calibration; leave it out"),
        ((files[0], f"{files[0]}:2"), "give each once"),
        ((files[0], model), "is a directory, but a plan is made from a calibration"),
        (("--data-free", model, files[0]), "--data-free plans from one checkpoint, but 2 paths"),
    ):
        refused(run("plan", *given_files, "-o", tmp_path / "refused.json"), 2, said)
    assert not list(tmp_path.glob("refused*"))


IMPOSSIBLE = (("--memory", "0.01"), ("--sweep", "--budgets", "0.01"), ("--policy", "eplb", "--ranks", "2", "--option", "slots=9"))


@pytest.mark.parametrize("arguments", IMPOSSIBLE)
def test_a_plan_that_cannot_be_made_leaves_no_merged_calibration(
    arguments: tuple[str, ...], tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    """Nor does it replace the files of an earlier plan."""
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        write_with_statistics(*calibrated(tiny_checkpoint("olmoe"), f"{file.stem}.txt"), file)
    plan = tmp_path / "plan.json"
    for earlier in (False, True):
        if earlier:
            assert run("plan", *files, "-o", plan).exit_code == 0
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert run("plan", f"{files[0]}:3", files[1], "-o", plan, *arguments).exit_code != 0
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
