"""Documents with values out of bounds: each is rejected with a sentence that names the place and the value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planning_inputs as inputs
import pytest
import torch
from frozen_files import FROZEN, PLANS

from rq_compile.calibration.recorded_loads import with_recorded_loads
from rq_compile.errors import UserError
from rq_compile.files import read_document
from rq_compile.schemas import DOCUMENTS

pytestmark = pytest.mark.quick

Spoil = Callable[[dict[str, Any]], object]


def spoilt(kind: str, spoil: Spoil, folder: Path) -> str:
    """The error message for the changed example."""
    example = {"calibration": PLANS / "calibration.json", "plan": PLANS / "optimal.cuda.2.json"}
    document = json.loads(example.get(kind, FROZEN / f"{kind}.v{DOCUMENTS[kind].current_version()}.json").read_text())
    spoil(document)
    file = folder / "document.json"
    file.write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        read_document(DOCUMENTS[kind], file)
    assert caught.value.exit_status == 2
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert f"; write it again with {DOCUMENTS[kind].command}" in sentence
    return sentence


def first(**values: Any) -> Spoil:
    return lambda document: document["layers"][0].update(values)


def shape(**values: Any) -> Spoil:
    return lambda document: document["layers"][0]["geometry"].update(values)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shape(hidden=-64), "layers.0.geometry.hidden is -64: input should be greater than or equal to 1"),
        (shape(intermediate=0), "layers.0.geometry.intermediate is 0"),
        (shape(top_k=0), "layers.0.geometry.top_k is 0"),
        (shape(top_k=7), "layers.0.geometry: top_k 7 is more than the 6 experts"),
        (shape(experts=2**20), "layers.0.geometry.experts is 1048576"),
        (shape(hidden=2**20, intermediate=2**20, experts=2**14), "are more than 2^50 bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["calibration", "plan"])
def test_geometries(kind: str, spoil: Spoil, words: str, tmp_path: Path) -> None:
    assert words in spoilt(kind, spoil, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (first(load=[-3, 1, 1, 1, 1, 1]), "layers.0.load.0 is -3"),
        (first(load=[2**70, 1, 1, 1, 1, 1]), "layers.0.load.0 is 1180591620717411303424: input should be less than"),
        (first(load=[2**52] * 6), f"load of layer 3 adds up to {6 * 2**52}, more than 2^53"),
        (first(text_loads=[[2**52] * 6, [1] * 6]), "text_loads of layer 3 adds up to"),
        (first(load=[1, 2]), "layer 3 has 6 experts, but 2 values of load"),
        (first(load=[]), "layer 3 has 6 experts, but 0 values of load"),
        (first(batch_loads=[]), "layers.0.batch_loads is []"),
        (first(batch_loads=[[]]), "0 values of batch_loads"),
        (first(text_loads=[[1] * 6]), "layer 3 has loads of 1 texts, but there are 2"),
        (first(error={"int8": [-1] + [0] * 5}), "layers.0.error.int8.0 is -1"),
        (first(error={"int8": [float("nan")] + [0] * 5}), "layers.0.error.int8.0 is NaN"),
        (first(error={"int8": [0]}), "1 values of error at int8"),
        (first(error={"int8": [0] * 6}), "layer 4 was measured in int4, int8, but layer 3 in int8"),
        (first(error=None), "layers.0.error is null"),
        (first(estimated=[6]), "estimated names expert 6"),
        (first(index=4), "layer 4 (model.layers.3.mlp.experts) appears twice"),
        (lambda document: document["layers"].append(document["layers"][0]), "layer 3 (model.layers.3.mlp.experts) appears twice"),
        (lambda document: document.update(batch_size=0), "batch_size is 0"),
        (lambda document: document.update(texts=[]), "texts is []"),
        (lambda document: document.update(layers=[]), "layers is []"),
    ],
)
def test_calibrations(spoil: Spoil, words: str, tmp_path: Path) -> None:
    assert words in spoilt("calibration", spoil, tmp_path)


def slot(**values: Any) -> Spoil:
    return lambda document: document["layers"][0]["slots"][1].update(values)


def predicted(**values: Any) -> Spoil:
    return lambda document: document["layers"][0]["predicted"].update(values)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (slot(rank=5), "layer 3 has a slot on rank 5, but the plan has 2 (0-1)"),
        (slot(rank=-1), "layers.0.slots.1.rank is -1"),
        (slot(expert=6), "layer 3 places expert 6, but the model has 6 experts (0-5)"),
        (slot(expert=-1), "layers.0.slots.1.expert is -1"),
        (slot(load=-0.25), "layers.0.slots.1.load is -0.25"),
        (slot(capacity_class=10**400), "layers.0.slots.1.capacity_class is 1000"),
        (first(slots=[]), "layers.0.slots is []"),
        (first(unreached=[6]), "layer 3 lists as unreached expert 6"),
        (first(index=4), "appears twice"),
        (predicted(error=None), "layers.0.predicted.error is null"),
        (predicted(error=-1), "layers.0.predicted.error is -1"),
        (predicted(step_time_before=0), "layers.0.predicted.step_time_before is 0"),
        (predicted(bytes_after=-1), "layers.0.predicted.bytes_after is -1"),
        (predicted(lis_before=float("inf")), "layers.0.predicted.lis_before is Infinity"),
        (lambda document: document.update(ranks=0), "ranks is 0"),
        (lambda document: document.update(memory=1e300), "memory is 1e+300"),
        (lambda document: document.update(fingerprint="\x1b[2J"), r'fingerprint is "\u001b[2J"'),
        (lambda document: document.update({"\x1b]0;": 1}), r"\x1b]0; is not a key"),
    ],
)
def test_plans(spoil: Spoil, words: str, tmp_path: Path) -> None:
    assert words in spoilt("plan", spoil, tmp_path)


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        ("engine", lambda d: d.update(vocabulary=0), "vocabulary is 0"),
        ("engine", lambda d: d.update(end_of_text=[-1]), "end_of_text.0 is -1"),
        (
            "engine",
            lambda d: d["graph"].update(name="../../etc/passwd"),
            "graph.name: '../../etc/passwd' is not the name of a file",
        ),
        ("engine", lambda d: d["graph"].update(bytes=-1), "graph.bytes is -1"),
        ("engine", lambda d: d["cache"][0].update(shape=["batch", -1]), "cache.0.shape.1"),
        ("engine", lambda d: d.update(activation_bits=7), "activation_bits is 7"),
        ("engine", lambda d: d["slot_offsets"].popitem(), "slot_offsets and the layers of the plan differ in model.layers"),
        ("engine", lambda d: d["slot_offsets"].update(x="y"), "slot_offsets and the layers of the plan differ in x"),
        ("engine", lambda d: d["plan"].update(schema_version=99), "plan: schema version 99 is that of a newer rq-compile"),
        ("engine", lambda d: d["plan"]["layers"][0].update(index=1), "appears twice"),
        ("tensorrt-engine", lambda d: d.update(compute_capabilities=[0]), "compute_capabilities.0 is 0"),
        ("tensorrt-engine", lambda d: d["profiles"][0]["batch"].update(most=2**40), "profiles.0.batch.most is 1099511627776"),
        ("evaluation", lambda d: d["total"].update(agreement=2), "total.agreement is 2"),
        ("evaluation", lambda d: d["total"].update(perplexity_reference=0), "total.perplexity_reference is 0"),
        ("evaluation", lambda d: d["total"].update(layers=[]), "has other layers than the total"),
        ("bench", lambda d: d["engine"].update(decode=0), "engine.decode is 0"),
        ("bench", lambda d: d.update(threads=0), "threads is 0"),
    ],
)
def test_manifests_and_results(kind: str, spoil: Spoil, words: str, tmp_path: Path) -> None:
    assert words in spoilt(kind, spoil, tmp_path)


def test_what_was_measured_may_be_infinite(tmp_path: Path) -> None:
    document = json.loads((FROZEN / "evaluation.v1.json").read_text())
    document["total"].update(perplexity_engine=None, kl=None)
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(document))
    read: Any = read_document(DOCUMENTS["evaluation"], file)
    assert read.total.kl is None
    assert json.loads(read.model_dump_json())["total"]["perplexity_engine"] is None


@pytest.mark.parametrize("counts", [1e19, 2.0**53 + 2, 2**63, [2**52] * 3])
def test_recorded_loads_beyond_what_can_be_counted(counts: Any, tmp_path: Path) -> None:
    calibration = inputs.calibration([inputs.layer([[1, 1, 1]], {"int8": [0.0] * 3})])
    row = counts if isinstance(counts, list) else [counts, 1, 1]
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": [[0, 0, 0]] * inputs.INDEX + [row]}))
    with pytest.raises(UserError, match=r"more than 2\^53") as caught:
        with_recorded_loads(calibration, [tmp_path / "loads.json"])
    assert "loads.json" in str(caught.value) or "layer 3" in str(caught.value)
    if not isinstance(counts, list) and counts < 2**63:
        torch.save({"logical_count": torch.tensor([[0, 0, 0]] * inputs.INDEX + [[int(counts), 1, 1]])}, tmp_path / "loads.pt")
        with pytest.raises(UserError, match=r"more than 2\^53"):
            with_recorded_loads(calibration, [tmp_path / "loads.pt"])


def test_nothing_of_a_foreign_file_steers_the_terminal(rq_compile: Callable, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"kind": "\x1b[2J\x1b]0;x\x07"}))
    for command in (["plan", file, "-o", tmp_path / "y.json"], ["replan", file, "--loads", file, "-o", tmp_path / "y.json"]):
        result = rq_compile(*command)
        assert result.exit_code == 2
        assert result.stderr.strip().isprintable()
        assert r"\x1b[2J" in result.stderr
    plan = json.loads((PLANS / "optimal.cuda.2.json").read_text())
    plan["model"] = plan["remarks"][0] = plan["layers"][0]["name"] = "a\x1b[2Jb\x9bc"
    file.write_text(json.dumps(plan))
    shown = rq_compile("inspect", file)
    assert shown.exit_code == 0
    assert all(line.isprintable() for line in shown.stdout.splitlines())
    assert r"a\x1b[2Jb\x9bc" in shown.stdout
