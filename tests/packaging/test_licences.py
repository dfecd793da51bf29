"""A checkpoint's licence information is copied to its engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from command_line import refused

from rq_compile.architectures.model import Model
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.runtime.files import read_manifest
from rq_compile.targets.licences import declared_licence, licence_texts
from rq_compile.targets.onnxruntime import compile_engine


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [moe]\n---\n# Model\n", "apache-2.0"),
        ("---\ntags:\n- moe\nlicense: other\nlicense_name: deepseek\n---\n", "deepseek"),
        ("---\nlicense: other\n---\n", "other"),
        ("\n---\nlicense: mit\n---", "mit"),
        ("---\ntags: [moe]\n---\nlicense: mit\n", None),
        ("# Model\n\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: 'mit\n---\n", None),
        ("---\n---\n", None),
        ("", None),
        (None, None),
    ],
)
def test_the_declared_licence_is_that_of_the_front_matter(tmp_path: Path, card: str | None, licence: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert declared_licence(tmp_path) == licence


def test_licence_texts_are_found_by_their_names(tmp_path: Path) -> None:
    for name in ("LICENSE", "License-code.txt", "NOTICE.md", "USE_POLICY.md", "README.md", "config.json"):
        (tmp_path / name).touch()
    (tmp_path / "LICENSES").mkdir()
    assert [path.name for path in licence_texts(tmp_path)] == ["LICENSE", "License-code.txt", "NOTICE.md", "USE_POLICY.md"]


def test_an_engine_has_its_models_licence(
    rq_compile: Callable[..., Result], export_once: Callable, model: Path, stages: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(model, tmp_path / "checkpoint")
    (checkpoint / "LICENSE").write_text("Use it well.\n")
    (checkpoint / "NOTICE.txt").write_text("Made of noise.\n")
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
    engine = tmp_path / "small.onnx"
    exported = export_once(Model.open(model))  # the same graph
    plan = read_document(Plan, stages / "plan.json")
    compile_engine(Model.open(checkpoint), plan.model_copy(update={"quantizer": "nearest"}), engine, exported=exported)
    manifest = read_manifest(engine)
    assert manifest.licence == "mit"
    assert [file.name for file in manifest.licences] == ["small.LICENSE", "small.NOTICE.txt"]
    assert (tmp_path / "small.LICENSE").read_text() == "Use it well.\n"

    (tmp_path / "small.LICENSE").write_text("Use it ill.\n\n")
    refused(rq_compile("inspect", engine, "--verify"), 1, "small.LICENSE", "damaged")


def test_an_engine_knows_where_a_text_begins_and_how_long_it_may_be(model: Path, stages: Path) -> None:
    manifest = read_manifest(stages / "model.onnx")
    assert (manifest.start_of_text, manifest.end_of_text) == (0, [1])
    assert manifest.context_length == json.loads((model / "config.json").read_text())["max_position_embeddings"]


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ('{"eos_token_id": "</s>"}', "has eos_token_id '</s>', which is not a whole number"),
        ('{"eos_token_id": [1, null]}', "has eos_token_id None"),
        ('{"decoder_start_token_id": 0.5}', "has decoder_start_token_id 0.5"),
        ("{", "cannot read"),
    ],
)
def test_what_is_said_of_tokens_is_read_before_the_long_work(
    rq_compile: Callable[..., Result],
    model: Path,
    stages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generation: str,
    words: str,
) -> None:
    monkeypatch.setattr("rq_compile.targets.onnxruntime.export_graph", lambda _: pytest.fail("it was exported"))
    checkpoint = Path(shutil.copytree(model, tmp_path / "checkpoint"))
    (checkpoint / "generation_config.json").write_text(generation)
    refused(rq_compile(checkpoint, "--plan", stages / "plan.json", "-o", tmp_path / "m.onnx", "-q"), 2, words)
