"""Conversations with an engine: its chat template is kept as the checkpoint has it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_engines import CHAT_TEMPLATE
from transformers import AutoTokenizer

import rq_compile as rq
from rq_compile.errors import UserError
from rq_compile.runtime.files import read_manifest
from rq_compile.standalone.chat_template import ChatTemplate
from rq_compile.standalone.decoding import Step
from rq_compile.standalone.sampling import GREEDY, Choice, SamplingParams

SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine(chat_engine: Path) -> rq.Engine:
    return rq.load(chat_engine, threads=1)


def test_the_template_and_its_tokens_are_in_the_engine(chat_engine: Path) -> None:
    manifest = read_manifest(chat_engine)
    assert (chat_engine.parent / "m.chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert manifest.chat_template in manifest.files
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert manifest.special_tokens == tokens


def test_prompts_are_those_of_transformers(engine: rq.Engine, model_with_chat: Path) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(model_with_chat)
    wanted = theirs.apply_chat_template(SAID, add_generation_prompt=True)["input_ids"]
    assert engine.chat_ids(SAID) == wanted
    assert wanted[0] == 0  # once


def test_an_answer(engine: rq.Engine) -> None:
    ids = engine.chat_ids(SAID)
    wanted = engine.tokenizer.decode(list(engine.generate(ids, 9)))
    assert "".join(engine.chat(SAID, 9, sampling=GREEDY)) == wanted
    seeded = SamplingParams(temperature=5, seed=1)
    choices: list[Choice] = []
    text = "".join(engine.chat(SAID, 9, sampling=seeded, on_choice=choices.append))
    assert engine.tokenizer.decode([choice.token for choice in choices]) == text != wanted
    assert text == "".join(engine.chat(SAID, 9, sampling=seeded))


@pytest.mark.parametrize(
    ("template", "reused"),
    [
        (CHAT_TEMPLATE, True),
        # Templates leave out earlier reasoning, for example.
        (CHAT_TEMPLATE.replace("message.content", "(message.content if message.role == 'user' else '')"), True),
        (CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}"), False),
    ],
    ids=["as it was", "without earlier answers", "another beginning"],
)
def test_the_next_turn_reads_its_new_tokens(
    chat_engine: Path, template: str, reused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rq.load(chat_engine, threads=1)
    engine.chat_template = ChatTemplate(template, engine.manifest.special_tokens)
    take, read = Step.__call__, list[int]()

    def noted(step: Step, ids: np.ndarray, *others: Any) -> np.ndarray:
        read.append(ids.shape[1])
        return take(step, ids, *others)

    monkeypatch.setattr(Step, "__call__", noted)
    messages, cache, before = [*SAID], engine.prefix_cache(), list[int]()
    for _ in range(3):
        ids = engine.chat_ids(messages)
        alone = "".join(engine.chat(messages, 9, sampling=GREEDY))
        read.clear()
        answer = "".join(engine.chat(messages, 9, sampling=GREEDY, prefix_cache=cache))
        assert answer == alone
        if before:
            assert read[0] <= len(ids) - len(before) if reused else read[0] >= len(ids) - 2
        before = ids
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]


def test_what_the_template_refuses(engine: rq.Engine) -> None:
    with pytest.raises(UserError, match="refuses it: unknown role robot; correct the conversation"):
        engine.chat_ids([{"role": "robot", "content": "a"}])


def test_an_engine_without_a_template(stages: Path) -> None:
    engine = rq.load(stages / "model.onnx")
    assert engine.chat_template is None
    with pytest.raises(UserError, match="has no chat template"):
        engine.chat_ids(SAID)


def test_a_damaged_template_is_refused(chat_engine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_engine.parent, tmp_path / "engine"))
    template = folder / "m.chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match=r"m\.chat_template\.jinja has .* bytes instead of"):
        rq.load(folder / "m.onnx")
    template.write_text("{% if".ljust(len(CHAT_TEMPLATE)))
    with pytest.raises(UserError, match="is not a chat template: "):
        rq.load(folder / "m.onnx").chat_ids(SAID)


@pytest.mark.parametrize("template", ["{% for %}", "{{ a b }}"])
def test_a_checkpoints_wrong_template_is_left_out(template: str, own_model: Path, engine_of: Callable[[Path], Path]) -> None:
    (own_model / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((own_model / "tokenizer_config.json").read_text()), "chat_template": template})
    )
    manifest = read_manifest(engine_of(own_model))
    assert manifest.chat_template is None
    assert manifest.replaced["chat templates left out because they are not valid"] == 1
