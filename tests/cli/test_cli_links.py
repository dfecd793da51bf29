"""Weights that stay in the checkpoint's shards, which are hard-linked beside the engine."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_types
import numpy as np
import onnx
import plans
import pytest
import tiny
import torch
from command_line import Run, names, refused, run_command, writing

from rq_compile.architectures.model import Model
from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.errors import UserError
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.files import read_manifest, verify
from rq_compile.targets.links import hard_linked, link_names
from rq_compile.targets.onnxruntime import compile_engine

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


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, stages: Path) -> list[object]:
    """A 16-bit checkpoint and a plan for it, as arguments of compile; its graph is exported once."""
    folder = tmp_path_factory.mktemp("bf16")
    model, calibration, plan = (
        tiny.build("olmoe", folder / "model", dtype=torch.bfloat16),
        folder / "c.json",
        folder / "plan.json",
    )
    for arguments in (("calibrate", model, "--text", stages / "text.txt", "-o", calibration), ("plan", calibration, "-o", plan)):
        assert run_command(*arguments, "-q").exit_code == 0
    return [model, "--plan", plan]


def test_16_bit_embeddings_are_linked_where_they_stay_16_bit(rq_compile: Run, bf16: list[object], out: Path) -> None:
    for name, link in (("written", ()), ("linked", ("--link-weights",))):
        assert rq_compile(*bf16, "-o", out / f"{name}.onnx", *link, "-q").exit_code == 0
    in_shards = {name for name, file in external(out / "linked.onnx").items() if file.endswith("safetensors")}
    assert in_shards == {"model.embed_tokens.weight"}
    engines = [Engine.load(out / f"{name}.onnx") for name in ("written", "linked")]
    np.testing.assert_array_equal(engines[0].logits(IDS), engines[1].logits(IDS))


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "gemma4"])
def test_what_transformers_loader_leaves_as_it_is_stored_is_linked(out: Path, model_type: str) -> None:
    """Of types without a table of names, both multimodal; Gemma's embedding is tied."""
    model = Model.open(model_types.build(model_type, out.parent / "model"))
    plan, exported = plans.plan_of(model, plans.unchanged), export_graph(model)
    for name in ("written", "linked"):
        compile_engine(model, plan, out / f"{name}.onnx", "native", exported=exported, link_weights=name == "linked")
    in_shard = {name for name, file in external(out / "linked.onnx").items() if file.endswith("safetensors")}
    assert any(name.endswith("embed_tokens.weight") for name in in_shard)
    saved, linked = ((out / f"{name}.onnx.data").stat().st_size for name in ("written", "linked"))
    assert saved - linked >= 4 * tiny.VOCABULARY * model.layers[0].geometry.hidden
    verify(out / "linked.onnx", read_manifest(out / "linked.onnx"))
    used = {model.tensor(parameter.name) for parameter in exported.parameters.values()}
    assert used.isdisjoint(model.agreement.other_parts)
    one, other = (Engine.load(out / f"{name}.onnx").logits(IDS) for name in ("written", "linked"))
    np.testing.assert_array_equal(one, other)


def test_what_the_engine_has_in_fp32_cannot_be_linked_in_bf16(rq_compile: Run, bf16: list[object], out: Path) -> None:
    result = rq_compile(*bf16, "--lowering", "stock", "-o", out / "model.onnx", "--link-weights")
    assert result.exit_code == 0, result.stderr
    assert "no weight can be linked: the checkpoint (bf16)" in result.stderr
    assert names(out) == ["model.json", "model.onnx", "model.onnx.data", "model.tokenizer.json"]


def test_an_exported_graph_compiles_again(
    rq_compile: Run, bf16: list[Any], out: Path, export_once: Callable[[Model], Exported]
) -> None:
    """The result does not depend on previous compilations of the graph: native keeps 16-bit tables, and stock adds a domain."""
    exported = export_once(Model.open(bf16[0]))
    before = exported.model.SerializeToString(deterministic=True)
    for lowering in ("native", "stock", "batched"):
        assert rq_compile(*bf16, "--lowering", lowering, "-o", out / f"{lowering}.onnx", "-q").exit_code == 0
        assert exported.model.SerializeToString(deterministic=True) == before


def test_another_that_is_refused_takes_only_its_own_link_away(out: Path) -> None:
    (out / "shard").write_text("weights")
    with hard_linked(out / "shard", out / "e.shard"):
        with pytest.raises(UserError), hard_linked(out / "shard", out / "e.shard"):
            raise UserError("another rq-compile is writing")
        assert not (out / "e.shard").exists()
    assert names(out) == ["e.shard", "shard"]
    assert (out / "e.shard").samefile(out / "shard")


def test_two_shards_of_one_name(out: Path) -> None:
    one, other = (StoredTensor(out / folder / "x.safetensors", 0, 4, "F32", (1,)) for folder in "ab")
    assert link_names({"w": one, "v": one}, out / "e.onnx") == {one.file: out / "e.x.safetensors"}
    with pytest.raises(
        UserError, match=r"a/x.safetensors and .*b/x.safetensors would both be linked as .*e.x.safetensors; leave"
    ):
        link_names({"w": one, "v": other}, out / "e.onnx")


def test_another_file_system(rq_compile: Run, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    result = rq_compile(*writing("compile", model, stages, out), "--link-weights", "-q")
    refused(result, 2, "cannot link", "model.safetensors", "leave --link-weights out")
    assert names(out) == []
