"""Weights that stay in the checkpoint's shards, hard-linked beside the engine."""

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from command_line import Run, names, refused, writing

from rq_compile.runtime.engine import Engine
from rq_compile.runtime.files import read_manifest, verify

IDS = np.arange(3, 20, dtype=np.int64)[None]


def external(engine: Path) -> dict[str, str]:
    """Weight -> file."""
    graph = onnx.load(engine, load_external_data=False).graph
    return {t.name: e.value for t in graph.initializer for e in t.external_data if e.key == "location"}


@pytest.mark.parametrize("lowering", ["native", "stock"])
def test_what_the_checkpoint_has_is_linked(rq_compile: Run, model: Path, stages: Path, out: Path, lowering: str) -> None:
    arguments = writing("compile", model, stages, out)
    written, linked = out / "written.onnx", out / "linked.onnx"
    assert rq_compile(*arguments[:-1], written, "--lowering", lowering, "-q").exit_code == 0
    result = rq_compile(*arguments[:-1], linked, "--lowering", lowering, "--link-weights")
    assert result.exit_code == 0, result.stderr
    assert "MB of dense weights; keep the checkpoint as it is" in result.stderr
    shard = out / "linked.model.safetensors"
    assert shard.samefile(model / "model.safetensors")
    assert {name for name, file in external(linked).items() if file == shard.name} >= {"model.embed_tokens.weight"}
    saved = (out / "written.onnx.data").stat().st_size - (out / "linked.onnx.data").stat().st_size
    assert saved >= tiny.VOCABULARY * tiny.COMMON["hidden_size"] * 4
    manifest = read_manifest(linked)
    assert [file.name for file in manifest.linked] == [shard.name]
    verify(linked, manifest)
    np.testing.assert_array_equal(Engine.load(linked).logits(IDS), Engine.load(written).logits(IDS))


def test_nothing_of_a_bf16_checkpoint_can_be_linked(rq_compile: Run, stages: Path, out: Path, tmp_path: Path) -> None:
    model = tiny.build("olmoe", tmp_path / "bf16", dtype=torch.bfloat16)
    options = ("--text", stages / "text.txt", "--policy", "none", "--lowering", "stock")
    result = rq_compile(model, *options, "-o", out / "model.onnx", "--link-weights")
    assert result.exit_code == 0, result.stderr
    assert "no weight can be linked: none of the engine's is stored like that in the checkpoint (bf16)" in result.stderr
    assert names(out) == ["model.json", "model.onnx", "model.onnx.data", "model.tokenizer.json"]


def test_another_file_system(rq_compile: Run, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    result = rq_compile(*writing("compile", model, stages, out), "--link-weights", "-q")
    refused(result, 2, "cannot link", "model.safetensors", "leave --link-weights out")
    assert names(out) == []
