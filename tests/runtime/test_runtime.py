"""An engine in ONNX Runtime: cache, padding, counted rows, and the messages when something is missing.

Every family's logits are compared with transformers in test_families.py; the tests here do not depend on the weights.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from plans import plan_of

from rq_compile.architectures.model import Model
from rq_compile.engine import library
from rq_compile.engine.library import OP_SET_VERSION
from rq_compile.errors import UserError
from rq_compile.planning.schema import Slot
from rq_compile.quantization.formats import Format
from rq_compile.rewrite.slot_weights import operands_of
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.standalone import decoding
from rq_compile.targets.onnxruntime import compile_engine

ATOL = 2e-5


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, tiny.VOCABULARY, shape)


@pytest.fixture(scope="module")
def engine(stages: Path) -> Engine:
    return Engine.load(stages / "model.onnx", threads=1)


@pytest.fixture
def copied(stages: Path, tmp_path: Path) -> Path:
    """A copy of the engine's files in a separate folder, to be damaged."""
    for file in stages.glob("model.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "model.onnx"


OF_VERSION_1 = ("float_weights", "int8_packed", "int8_scales", "int4_packed", "int4_scales", "bias")


def as_of_version_1(engine: Path) -> None:
    """Write the graph and the manifest as they were when a node kept a place for the weights of every format."""
    model = onnx.load(engine, load_external_data=False)
    for node in (node for node in model.graph.node if node.op_type == "ExpertGemm"):
        (formats,) = (attribute.ints for attribute in node.attribute if attribute.name == "formats")
        held = dict(zip(operands_of(formats), node.input[3:], strict=False))
        inputs = [*node.input[:3], *(held.get(name, "") for name in OF_VERSION_1)]
        while not inputs[-1]:
            inputs.pop()
        node.ClearField("input")
        node.input.extend(inputs)
    for entry in (entry for entry in model.opset_import if entry.domain == "rq.moe"):
        entry.version = 1
    onnx.save(model, engine)
    told = json.loads(engine.with_suffix(".json").read_text())
    told["op_library"], told["graph"]["bytes"] = 1, engine.stat().st_size
    engine.with_suffix(".json").write_text(json.dumps(told))


@pytest.mark.parametrize("formats", [["int4"], ["int8"], ["fp16"], ["int8", "fp16"], ["int4", "int8", "bf16"]])
def test_an_engine_of_version_1_runs(formats: list[Format], model: Path, export_once: Callable, tmp_path: Path) -> None:
    opened = Model.open(model)
    slots = lambda layer: [Slot(expert=e, format=formats[e % len(formats)]) for e in range(layer.geometry.experts)]  # noqa: E731
    compile_engine(opened, plan_of(opened, slots), tmp_path / "m.onnx", exported=export_once(opened))
    ids = tokens(2, 9)
    expected = Engine.load(tmp_path / "m.onnx", threads=1).logits(ids)
    before = (tmp_path / "m.onnx").read_bytes()
    as_of_version_1(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() != before
    np.testing.assert_array_equal(Engine.load(tmp_path / "m.onnx", threads=1).logits(ids), expected)


def test_an_engine_of_a_newer_version_of_the_ops_is_refused(copied: Path) -> None:
    told = json.loads(copied.with_suffix(".json").read_text()) | {"op_library": OP_SET_VERSION + 1}
    copied.with_suffix(".json").write_text(json.dumps(told))
    with pytest.raises(
        UserError, match=rf"needs version {OP_SET_VERSION + 1} of the ops rq\.moe, .* has {OP_SET_VERSION}; update rq-compile"
    ):
        Engine.load(copied)


def test_generating_with_the_cache_is_recomputing_everything(engine: Engine) -> None:
    ids = tokens(5).tolist()
    generated = list(engine.generate(ids, 20, stop=False))
    for length in range(20):
        logits = engine.logits(np.array([ids + generated[:length]]))
        assert generated[length] == logits[0, -1].argmax()


@pytest.mark.parametrize("pieces", [(12,), (5, 7), (1, 1, 1, 9), (11, 1)])
def test_text_in_pieces_through_the_cache_gives_the_same_logits(engine: Engine, pieces: tuple[int, ...]) -> None:
    """As any other runtime would do it, from the manifest and the graph."""
    ids, past_length = tokens(3, 12), 0
    cache = engine.manifest.cache
    past = {tensor.past: tensor.empty(3) for tensor in cache}
    got = []
    for piece in pieces:
        feeds = {
            "input_ids": ids[:, past_length : past_length + piece],
            "attention_mask": np.ones((3, past_length + piece), np.int64),
            "position_ids": np.arange(past_length, past_length + piece)[None].repeat(3, axis=0),
            "logits_to_keep": np.array([0]),
        }
        logits, *present = engine._session.run(["logits", *(tensor.present for tensor in cache)], {**feeds, **past})
        past = {tensor.past: value for tensor, value in zip(cache, present, strict=True)}
        past_length += piece
        got.append(logits)
        assert all(value.shape[2] == past_length for value in past.values())
    np.testing.assert_allclose(np.concatenate(got, axis=1), engine.logits(ids), atol=ATOL, rtol=0)


def test_the_cache_of_a_prompt_in_pieces_gets_room_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the first tokens of the answer."""
    rooms: list[int] = []
    with_room = decoding.with_room

    def counted(cache: Sequence[Any], arrays: Sequence[np.ndarray], held: int, room: int) -> list[np.ndarray]:
        rooms.append(room)
        return with_room(cache, arrays, held, room)

    prompt = tokens(1, 300)[0].tolist()
    said = engine.manifest.model_dump(include={"cache"})
    expected = list(islice(decoding.decode(engine._session, said, prompt), 5))
    monkeypatch.setattr(decoding, "with_room", counted)
    found = list(islice(decoding.decode(engine._session, {**said, "prefill_chunk": 100}, prompt), 5))
    assert found == expected
    assert rooms == [600]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(engine: Engine, side: str) -> None:
    lengths, width = (9, 4, 1), 9
    ids, mask = np.full((3, width), 2), np.zeros((3, width), np.int64)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = tokens(length, seed=row), 1
    logits = engine.logits(ids, mask)
    for row, length in enumerate(lengths):
        alone = engine.logits(tokens(1, length, seed=row))
        np.testing.assert_allclose(logits[row][mask[row] == 1], alone[0], atol=ATOL, rtol=0)


def test_an_answer_does_not_depend_on_who_shares_the_batch(engine: Engine) -> None:
    """All copies of an expert have one format, so it does not matter which of them a token is sent to."""
    ids = tokens(4, 7)
    together = engine.logits(ids)
    for row in range(4):
        np.testing.assert_allclose(together[row], engine.logits(ids[row : row + 1])[0], atol=ATOL, rtol=0)
    np.testing.assert_allclose(engine.logits(ids[::-1])[::-1], together, atol=ATOL, rtol=0)


def test_the_same_call_gives_the_same_bits(engine: Engine, stages: Path) -> None:
    ids = tokens(2, 33)
    first = engine.logits(ids)
    for threads in (1, 2, 2):
        np.testing.assert_array_equal(Engine.load(stages / "model.onnx", threads).logits(ids), first)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 64)])
def test_counted_rows_are_every_choice_of_every_token(engine: Engine, shape: tuple[int, int]) -> None:
    ids = tokens(*shape)
    logits, rows = engine.counted_logits(ids)
    np.testing.assert_array_equal(logits, engine.logits(ids))
    plan = engine.manifest.plan
    assert set(rows) == {layer.name for layer in plan.layers}
    for layer in plan.layers:
        counts = rows[layer.name]
        assert counts.shape == (len(layer.slots),)
        assert counts.sum() == ids.size * layer.geometry.top_k
        for expert in range(layer.geometry.experts):
            copies = counts[[slot.expert == expert for slot in layer.slots]]
            assert copies.max() - copies.min() <= 1
    assert {name: counts.tolist() for name, counts in engine.loads(ids).items()} == {
        name: counts.tolist() for name, counts in rows.items()
    }


def test_counted_rows_are_those_that_transformers_routes(
    engine: Engine, stages: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """On the first layer, whose inputs do not depend on the plan."""
    ids = tokens(2, 40)
    model = Reference.load(Model.open(tiny_checkpoint("olmoe"))).model
    chosen: list[np.ndarray] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2].numpy()))
    Reference(model).logits(ids)
    layer = engine.manifest.plan.layers[0]
    by_slot = engine.loads(ids)[layer.name]
    by_expert = np.bincount([slot.expert for slot in layer.slots], by_slot, layer.geometry.experts)
    np.testing.assert_array_equal(by_expert, np.bincount(chosen[0].ravel(), minlength=layer.geometry.experts))


def test_generating_ends_at_the_end_of_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(5).tolist()
    free = list(engine.generate(ids, 8, stop=False))
    ended = engine.manifest.model_copy(update={"end_of_text": [free[3]]})
    monkeypatch.setattr(engine, "manifest", ended)
    assert list(engine.generate(ids, 8)) == free[: free.index(free[3])]
    assert list(engine.generate(ids, 8, stop=False)) == free


@pytest.mark.parametrize(
    ("ids", "sentence"), [([], "the prompt is empty"), ([5, 128], "outside the vocabulary"), ([-1], "outside")]
)
def test_prompts_that_cannot_be_continued(engine: Engine, ids: list[int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        list(engine.generate(ids, 1))
    assert caught.value.exit_status == 2


# Files


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "model.onnx.data", "model.tokenizer.json"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied.parent / name).unlink()
    with pytest.raises(UserError, match=name) as caught:
        Engine.load(copied)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.tokenizer.json"])
def test_a_file_that_was_cut_short_is_named(copied: Path, name: str) -> None:
    content = (copied.parent / name).read_bytes()
    (copied.parent / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} has {len(content) - 1} bytes instead of {len(content)}"):
        Engine.load(copied)


@pytest.mark.parametrize("key", ["past", "present"])
def test_a_cache_that_the_graph_does_not_have_is_one_sentence(copied: Path, key: str) -> None:
    manifest = json.loads(copied.with_suffix(".json").read_text())
    manifest["cache"][0][key] = "another"
    copied.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"model\.onnx and its manifest differ in (another|past_key_values\.0\.key); copy both"):
        Engine.load(copied)


@pytest.mark.parametrize("slots", [slice(1, None), slice(None, -1)])
def test_a_manifest_of_other_slots_is_refused_where_rows_are_counted(stages: Path, slots: slice) -> None:
    engine = Engine.load(stages / "model.onnx", threads=1)
    first, *others = engine.manifest.plan.layers
    layers = [first.model_copy(update={"slots": first.slots[slots]}), *others]
    plan = engine.manifest.plan.model_copy(update={"layers": layers})
    other = Engine(engine.path, engine.manifest.model_copy(update={"plan": plan}), 1)
    with pytest.raises(UserError, match=rf"differ in the slots of layer 0 \({len(first.slots)} and {len(first.slots) - 1}\)"):
        other.loads(np.ones((1, 3), np.int64))


def test_a_graph_that_does_not_load_is_one_sentence(copied: Path) -> None:
    size = copied.stat().st_size
    copied.write_bytes(bytes(size))
    with pytest.raises(UserError, match=r"ONNX Runtime .* cannot load .*model\.onnx") as caught:
        Engine.load(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("isa", ["mmx", "AVX2"])
def test_an_unknown_instruction_set_is_one_sentence(stages: Path, isa: str) -> None:
    """In a process of its own: the op library reads the variable once."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "rq_compile",
        "generate",
        str(stages / "model.onnx"),
        "--prompt",
        "a",
        "--max-tokens",
        "1",
    ]
    result = subprocess.run(command, env=os.environ | {"RQ_MOE_ISA": isa}, capture_output=True, text=True, check=False)
    *_, said = result.stderr.strip().splitlines()
    assert result.returncode == 2
    assert re.fullmatch(
        rf"error: RQ_MOE_ISA is '{isa}', which is not one of .*: .*plain; unset it to use the first of them", said
    )


def test_an_engine_moves_with_its_files(copied: Path, engine: Engine) -> None:
    """They do not contain the name of the folder that they were written to."""
    ids = tokens(1, 6)
    np.testing.assert_array_equal(Engine.load(copied, threads=1).logits(ids), engine.logits(ids))
    np.testing.assert_array_equal(Engine.load(copied, threads=1).counted_logits(ids)[0], engine.logits(ids))


def test_an_engine_without_tokenizer_runs_on_ids(copied: Path) -> None:
    manifest = json.loads(copied.with_suffix(".json").read_text())
    manifest["tokenizer"] = None
    copied.with_suffix(".json").write_text(json.dumps(manifest))
    engine = Engine.load(copied, threads=1)
    assert len(list(engine.generate([5], 3, stop=False))) == 3
    with pytest.raises(UserError, match="has no tokenizer"):
        engine.tokenizer  # noqa: B018


def test_a_missing_op_library_is_told(stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.rq_compile, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"custom-op library .* is missing; .*--lowering stock"):
        Engine.load(stages / "model.onnx")
