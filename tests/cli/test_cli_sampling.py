"""How tokens are chosen and where a text stops: in the checkpoint's generation_config.json, the Python API and ``generate``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run, refused
from own_engines import DRAWN
from transformers import AutoModelForCausalLM

import rq_compile as rq
from rq_compile.architectures.model import Model
from rq_compile.errors import UserError
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.files import read_manifest
from rq_compile.standalone.sampling import Sampler, SamplingParams, sampling_params

PROMPT = "Once upon"


@pytest.fixture(scope="module")
def engine(chat_engine: Path) -> rq.Engine:
    return rq.load(chat_engine, threads=1)


def generated(rq_compile: Run, path: Path, *options: object) -> dict[str, Any]:
    result = rq_compile("generate", path, "--prompt", PROMPT, "--max-tokens", 12, "--threads", 1, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_checkpoints_settings_are_the_defaults(chat_engine: Path, engine: rq.Engine, rq_compile: Run) -> None:
    assert read_manifest(chat_engine).sampling.model_dump() == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert engine.default_sampling == SamplingParams(0.7, 20, 0.95)
    seeded = SamplingParams(0.7, 20, 0.95, seed=5)
    wanted = list(engine.generate(engine.tokenizer.encode(PROMPT).ids, 12, sampling=seeded))
    assert generated(rq_compile, chat_engine, "--seed", 5)["tokens"] == wanted
    assert generated(rq_compile, chat_engine, "--seed", 5, "--temperature", 0)["tokens"] == list(
        engine.generate(engine.tokenizer.encode(PROMPT).ids, 12)
    )
    assert len({tuple(generated(rq_compile, chat_engine)["tokens"]) for _ in range(3)}) > 1  # drawn, with other seeds


def test_greedy_answers_are_those_of_transformers_with_a_repetition_penalty(
    model_with_chat: Path, engine: rq.Engine, chat_engine: Path, rq_compile: Run
) -> None:
    ids = engine.tokenizer.encode(PROMPT).ids
    options = {"do_sample": False, "repetition_penalty": 1.7, "max_new_tokens": 12, "top_k": None, "top_p": None}
    model = AutoModelForCausalLM.from_pretrained(model_with_chat)
    wanted = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), pad_token_id=1, **options)[0, len(ids) :]
    plain = engine.generate(ids, 12)
    # The engine is quantized, so its own logits are compared, not those of transformers.
    sampler, tokens = Sampler(SamplingParams(0, repetition_penalty=1.7), ids), list(ids)
    for _ in range(12):
        tokens.append(sampler.choose(engine.logits(np.array([tokens]))[0, -1]).token)
        if tokens[-1] == 1:
            break
    answer = generated(rq_compile, chat_engine, "--temperature", 0, "--repetition-penalty", 1.7)["tokens"]
    assert answer == [token for token in tokens[len(ids) :] if token != 1]
    assert answer != list(plain)
    assert len(set(answer) & set(wanted.tolist())) >= len(answer) // 2


@pytest.mark.parametrize(
    ("given", "defaults", "temperature"),
    [
        ({}, {"temperature": 0.0}, 0),
        ({"top_p": 0.9}, {"temperature": 0.0}, 1),
        ({"seed": 0}, {"temperature": 0.0}, 1),
        ({"top_p": None, "seed": None}, {"temperature": 0.0}, 0),
        ({"logit_bias": {3: 1}, "stop": ["x"]}, {"temperature": 0.0}, 0),
        ({"top_p": 0.9, "temperature": 0}, {"temperature": 0.0}, 0),
        ({"top_p": 0.9}, {"temperature": 0.6, "top_k": 5}, 0.6),
        ({"temperature": 0.3}, {"temperature": 0.6, "top_k": 5}, 0.3),
    ],
)
def test_a_request_over_defaults(given: dict[str, Any], defaults: dict[str, Any], temperature: float) -> None:
    params = sampling_params(given, defaults)
    assert params.temperature == temperature
    assert params.top_k == defaults.get("top_k", 0)


def test_stop_strings_and_biases(engine: rq.Engine, chat_engine: Path, rq_compile: Run) -> None:
    free = generated(rq_compile, chat_engine, "--temperature", 0)
    stop = free["text"][4:6]  # over two tokens, which are letters
    cut = generated(rq_compile, chat_engine, "--temperature", 0, "--stop", stop, "--stop", "never there")
    assert cut["text"] == free["text"].split(stop)[0]
    assert len(cut["tokens"]) < len(free["tokens"])
    shown = rq_compile("generate", chat_engine, "--prompt", PROMPT, "--temperature", 0, "--stop", stop, "-q").stdout
    assert shown == f"{PROMPT}{cut['text']}\n"
    token = engine.tokenizer.token_to_id("q")
    biased = generated(rq_compile, chat_engine, "--temperature", 0, "--logit-bias", f"{token}=100", "--max-tokens", 3)
    assert biased["text"] == "q q q"  # the tiny tokenizer puts spaces between tokens
    [banned] = {free["tokens"][0]}
    assert banned not in generated(rq_compile, chat_engine, "--temperature", 0, "--logit-bias", f"{banned}=-100")["tokens"]


def test_log_probabilities(engine: rq.Engine, chat_engine: Path, rq_compile: Run) -> None:
    said = generated(rq_compile, chat_engine, "--logprobs", 3, "--seed", 1)
    ids = engine.tokenizer.encode(PROMPT).ids
    for step, one in enumerate(said["logprobs"]):
        logits = engine.logits(np.array([[*ids, *said["tokens"][:step]]]))[0, -1]
        exact = torch.from_numpy(logits).double().log_softmax(-1)
        values, best = exact.topk(3)
        assert one["token"] == said["tokens"][step]
        assert one["logprob"] == pytest.approx(float(exact[one["token"]]), abs=1e-4)
        assert [each["token"] for each in one["top"]] == best.tolist()
        assert [each["logprob"] for each in one["top"]] == pytest.approx(values.tolist(), abs=1e-4)
    refused(rq_compile("generate", chat_engine, "--prompt", "a", "--logprobs", 3), 2, "--logprobs 3", "--json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", -1], ["--temperature is -1", "give a number"]),
        (["--top-p", 1.5], ["--top-p is 1.5"]),
        (["--top-k", -7], ["--top-k is -7", "whole number"]),
        (["--min-p", "much"], ["--min-p", "not a valid float"]),
        (["--seed", 2**70], ["--seed is"]),
        (["--stop", ""], ["--stop is"]),
        (["--logit-bias", "17"], ["--logit-bias '17' is not ID=BIAS"]),
        (["--logit-bias", "a=1"], ["--logit-bias 'a=1'"]),
        (["--logit-bias", "5000=1"], ["--logit-bias names the token 5000", "0 to 127"]),
        (["--logit-bias", "5=101"], ["--logit-bias of token 5 is 101"]),
        (["--tempreature", 1], ["no such option", "--temperature"]),
    ],
)
def test_wrong_options(options: list[object], words: list[str], chat_engine: Path, rq_compile: Run) -> None:
    refused(rq_compile("generate", chat_engine, "--prompt", "a", *options), 2, *words)


STATED: dict[str, tuple[dict[str, Any] | None, dict[str, float]]] = {
    "nothing": (None, {"temperature": 0}),
    "values without do_sample": ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0}),
    "a penalty without do_sample": ({"repetition_penalty": 1.1}, {"temperature": 0, "repetition_penalty": 1.1}),
    "do_sample alone": ({"do_sample": True}, {"temperature": 1}),
    "null": ({"do_sample": True, "temperature": None, "top_k": None}, {"temperature": 1}),
    "all": (DRAWN | {"min_p": 0.1, "eta_cutoff": 1}, {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.1}),
}


@pytest.mark.parametrize("name", STATED)
def test_what_a_checkpoint_states(name: str, own_model: Path) -> None:
    stated, wanted = STATED[name]
    (own_model / "generation_config.json").unlink()
    if stated is not None:
        (own_model / "generation_config.json").write_text(json.dumps(stated))
    assert Model.open(own_model).sampling == wanted


@pytest.mark.parametrize("stated", [{"temperature": "hot"}, {"top_p": 1.5}, {"top_k": [3]}, {"temperature": -1}])
def test_a_checkpoint_with_wrong_values(stated: dict[str, Any], own_model: Path) -> None:
    (own_model / "generation_config.json").write_text(json.dumps({"do_sample": True, **stated}))
    with pytest.raises(UserError, match=f"{next(iter(stated))} is .* in generation_config.json; correct it there"):
        _ = Model.open(own_model).sampling


def test_engines_of_before_are_greedy(stages: Path) -> None:
    assert Engine.load(stages / "model.onnx").default_sampling == SamplingParams(temperature=0)
