"""The server answers OpenAI's client as the engine answers in Python."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from served import PROMPT, TALK, until

import rq_compile as rq
from rq_compile.serving.served_model import ServedModel
from rq_compile.standalone.sampling import GREEDY, SamplingParams


def greedy(engine: rq.Engine, prompt: str, count: int, **more: Any) -> str:
    ids = engine.tokenizer.encode(prompt).ids
    return engine.tokenizer.decode(list(engine.generate(ids, count, sampling=SamplingParams(temperature=0, **more))))


def test_a_completion(client: OpenAI, engine: rq.Engine) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    [choice] = answer.choices
    assert choice.text == greedy(engine, PROMPT, 20)
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "tiny", "cmpl-")
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None
    read = len(engine.tokenizer.encode(PROMPT).ids)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (read, read + answer.usage.completion_tokens)
    # 16 tokens, as OpenAI documents.
    assert client.completions.create(model="tiny", prompt=PROMPT, temperature=0).choices[0].text == greedy(engine, PROMPT, 16)


def test_a_chat_completion(client: OpenAI, engine: rq.Engine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TALK, max_completion_tokens=12, temperature=0)
    wanted = "".join(engine.chat(TALK, 12, sampling=GREEDY))
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.chat_ids(TALK))
    parts: list[Any] = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, TALK[1]]
    again = client.chat.completions.create(model="tiny", messages=parts, max_tokens=12, temperature=0)
    assert again.choices[0].message.content == wanted


def test_the_next_turn_of_a_conversation_is_not_read_again(client: OpenAI, engine: rq.Engine) -> None:
    messages: list[Any] = [{"role": "user", "content": "A conversation of its own"}]
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 9}
    first = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
    before = len(engine.chat_ids(messages))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    answer = client.chat.completions.create(messages=messages, n=2, **asked)
    assert answer.choices[0].message.content == "".join(engine.chat(messages, 9, sampling=GREEDY))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert before <= answer.usage.prompt_tokens_details.cached_tokens < answer.usage.prompt_tokens


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4}, {"seed": 4, "temperature": 3, "top_p": 0.9}])
def test_streams_are_the_whole_answer(client: OpenAI, options: dict[str, Any]) -> None:
    given = {"model": "tiny", "max_tokens": 24, **options}
    whole = client.completions.create(prompt=PROMPT, **given)
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **given))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens > whole.usage.prompt_tokens
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 1

    said = client.chat.completions.create(messages=TALK, **given)
    talk = list(client.chat.completions.create(messages=TALK, stream=True, **given))
    assert talk[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in talk) == said.choices[0].message.content
    assert talk[-1].choices[0].finish_reason == said.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in talk)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_token_ids(served: str, engine: rq.Engine, path: str) -> None:
    """As in vLLM; also of tokens without text."""
    asked = {"prompt": PROMPT, "messages": TALK, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    whole = httpx.post(f"{served}/v1/{path}", json=asked).json()["choices"][0]
    ids = engine.chat_ids(TALK) if "chat" in path else engine.tokenizer.encode(PROMPT).ids
    assert whole["token_ids"] == list(engine.generate(ids, 24, stop=False))
    lines = httpx.post(f"{served}/v1/{path}", json={**asked, "stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [token for event in events for token in event["choices"][0].get("token_ids", ())] == whole["token_ids"]
    assert "token_ids" not in httpx.post(f"{served}/v1/{path}", json={**asked, "return_token_ids": False}).text


def test_the_engines_defaults_are_used(client: OpenAI, engine: rq.Engine) -> None:
    """The checkpoint of this engine says do_sample, temperature 0.7, top_k 20 and top_p 0.95."""
    ids = engine.tokenizer.encode(PROMPT).ids
    wanted = engine.tokenizer.decode(list(engine.generate(ids, 12, sampling=SamplingParams(0.7, 20, 0.95, seed=9))))
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=9).choices[0].text == wanted
    more = {"top_k": 2, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
    params = SamplingParams(2.0, 2, 0.95, 0.1, 1.2, seed=9, ignore_eos=True)
    wanted = engine.tokenizer.decode(list(engine.generate(ids, 12, sampling=params)))
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=9, temperature=2, extra_body=more)
    assert answer.choices[0].text == wanted


def test_seeded_answers_do_not_depend_on_the_others(client: OpenAI) -> None:
    def answer(seed: int) -> str:
        return client.completions.create(model="tiny", prompt=PROMPT[: 4 + seed], max_tokens=20, seed=seed).choices[0].text

    alone = [answer(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as clients:
        assert list(clients.map(answer, range(6))) == alone
    assert len(set(alone)) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_of_several_prompts(client: OpenAI, engine: rq.Engine, stream: bool) -> None:
    ids = engine.tokenizer.encode("Second").ids
    given: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "seed": 2, "n": 2, "temperature": 1.5}
    alone = [
        client.completions.create(prompt=prompt, **given | {"n": 1, "seed": seed}).choices[0].text
        for prompt in ("First", "Second")
        for seed in (2, 3)
    ]
    if stream:
        texts = ["", "", "", ""]
        for chunk in client.completions.create(prompt=["First", "Second"], stream=True, **given):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == alone
    else:
        assert [choice.text for choice in client.completions.create(prompt=["First", "Second"], **given).choices] == alone
        both = client.completions.create(prompt=[ids, ids], **given)
        assert [choice.text for choice in both.choices] == alone[2:] * 2
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: OpenAI, engine: rq.Engine, model: ServedModel, stream: bool) -> None:
    free = greedy(engine, PROMPT, 30, ignore_eos=True)
    stop = free[9:12]
    given: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stop": [stop, "never"]}
    if stream:
        chunks = list(client.completions.create(stream=True, **given))
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        [choice] = client.completions.create(**given).choices
        text, reason = choice.text, choice.finish_reason
    assert text == free.split(stop)[0]
    assert reason == "stop"
    until(lambda: model.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: OpenAI, engine: rq.Engine, stream: bool) -> None:
    given: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "seed": 1}
    ids = engine.chat_ids(TALK)
    if stream:
        chunks = client.chat.completions.create(messages=TALK, logprobs=True, top_logprobs=3, stream=True, **given)
        tokens = [one for chunk in chunks for one in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []]
    else:
        answer = client.chat.completions.create(messages=TALK, logprobs=True, top_logprobs=3, **given)
        assert answer.choices[0].logprobs is not None
        tokens = answer.choices[0].logprobs.content or []
    params = replace(engine.default_sampling, seed=1, logprobs=3)  # tests/cli/test_sampling.py compares these with torch

    def shown(token: int) -> str:
        return engine.tokenizer.decode([token], skip_special_tokens=False)

    for one, wanted in zip(tokens, engine.choices(ids, 5, sampling=params), strict=True):
        assert (one.token, bytes(one.bytes or []).decode()) == (shown(wanted.token), shown(wanted.token))
        assert one.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert [each.token for each in one.top_logprobs] == [shown(token) for token, _ in wanted.top]
        assert [each.logprob for each in one.top_logprobs] == pytest.approx([value for _, value in wanted.top], abs=1e-4)
    assert client.completions.create(prompt="a", **given).choices[0].logprobs is None
    logprobs = client.completions.create(prompt="a", logprobs=2, **given).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:number])) for number in range(5)]
    assert all(len(top) in (2, 3) for top in logprobs.top_logprobs or [])


def test_echo(client: OpenAI) -> None:
    given: dict[str, Any] = {"model": "tiny", "prompt": ["One", "Two"], "max_tokens": 4, "temperature": 0}
    plain = [choice.text for choice in client.completions.create(**given).choices]
    whole = [choice.text for choice in client.completions.create(echo=True, **given).choices]
    assert whole == [f"One{plain[0]}", f"Two{plain[1]}"]
    texts = ["", ""]
    for chunk in client.completions.create(echo=True, stream=True, **given):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole


def test_an_answer_can_continue_the_last_message(client: OpenAI, engine: rq.Engine) -> None:
    said: list[Any] = [TALK[1], {"role": "assistant", "content": "I am"}]
    variables: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    answer = client.chat.completions.create(model="tiny", messages=said, max_tokens=6, temperature=0, extra_body=variables)
    assert answer.choices[0].message.content == "".join(engine.chat(said, 6, sampling=GREEDY, **variables))


def test_models(client: OpenAI, served: str) -> None:
    [one] = client.models.list().data
    assert (one.id, one.owned_by) == ("tiny", "rq-compile")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other/one'; use 'tiny'"):
        client.models.retrieve("other/one")


def test_every_event_is_one_line_of_json(served: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "stream": True}
    lines = httpx.post(f"{served}/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:
        assert json.loads(line.removeprefix("data: "))["object"] == "text_completion"
