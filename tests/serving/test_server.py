"""The server answers OpenAI's client as the engine answers in Python, refuses what it cannot answer, and frees what is no longer
wanted."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

import rq_compile as rq
from rq_compile.serving.app import application
from rq_compile.serving.served_model import ServedModel
from rq_compile.serving.server import Server, listening, url
from rq_compile.standalone.sampling import GREEDY, SamplingParams

PROMPT = "Once upon a time"
TALK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
SLOTS, WAITING = 4, 4


@pytest.fixture(scope="module")
def engine(chat_engine: Path) -> rq.Engine:
    return rq.load(chat_engine, threads=1)


@pytest.fixture(scope="module")
def model(engine: rq.Engine) -> ServedModel:
    return ServedModel(engine, "tiny", slots=SLOTS, max_length=None, max_waiting=WAITING)


@pytest.fixture(scope="module")
def served(model: ServedModel) -> Iterator[str]:
    yield from running(model)


def running(model: ServedModel) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    import uvicorn

    with listening("127.0.0.1", 0) as listener:
        started = threading.Event()
        config = uvicorn.Config(application(model, 100_000), log_level="error", lifespan="on", timeout_graceful_shutdown=2)
        server = Server(config, started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert started.wait(30)
        yield url(listener)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(served: str) -> OpenAI:
    return OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0)


def greedy(engine: rq.Engine, prompt: str, count: int, **more: Any) -> str:
    ids = engine.tokenizer.encode(prompt).ids
    return engine.tokenizer.decode(list(engine.generate(ids, count, sampling=SamplingParams(temperature=0, **more))))


def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


# Answers.


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


# Requests that are refused.

HALF = b'{"prompt": "a\\ud800", "messages": [{"role": "user", "content": "a\\ud800"}]}'  # of a surrogate pair
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": -1}, "temperature is -1"),
    "top_p": ({"top_p": 0}, "top_p is 0"),
    "a type": ({"temperature": "hot"}, "temperature is 'hot'"),
    "n": ({"n": 0}, "n is 0"),
    "too many": ({"n": 100}, "asks for 100 answers; ask for at most 8"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens is 0"),
    "too long": ({"max_tokens": 5000}, "exceed the longest sequence, 256"),
    "stop": ({"stop": [""]}, "stop is"),
    "a bias": ({"logit_bias": {"999": 1}}, "logit_bias names the token 999"),
    "options of streams": ({"stream_options": {"include_usage": True}}, "stream_options is only for streams"),
    "a format": ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
}
OF_COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "no prompt": ({"prompt": None}, "prompt is missing"),
    "no prompts": ({"prompt": []}, "prompt is an empty list"),
    "unknown tokens": ({"prompt": [5, 4000]}, "a token outside the vocabulary"),
    "mixed": ({"prompt": ["a", 3]}, "prompt"),
    "a suffix": ({"suffix": "b"}, "suffix is not supported"),
    "many logprobs": ({"logprobs": 99}, "logprobs is 99"),
    "echoed logprobs": ({"logprobs": 1, "echo": True}, "logprobs of an echoed prompt"),
    "best_of": ({"best_of": 3}, "best_of is not supported"),
}
OF_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages is"),
    "no role": ({"messages": [{"content": "a"}]}, "a message has no role"),
    "a wrong role": ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role robot"),
    "text": ({"messages": "Hello"}, "messages is"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of type 'image_url'"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "content of type 3"),
    "tools": ({"tools": [{"type": "function"}]}, "tools is not supported"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs is only for logprobs"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 50}, "logprobs is 50"),
    "two ends": ({"continue_final_message": True}, "contradicts"),
    "variables": ({"chat_template_kwargs": {"messages": []}}, "cannot have the key messages"),
}


@pytest.mark.parametrize("name", [*REFUSED, *OF_COMPLETIONS])
def test_refused_completions(name: str, served: str) -> None:
    changes, said = (REFUSED | OF_COMPLETIONS)[name]
    body = {"model": "tiny", "prompt": "a", **changes}
    refused(httpx.post(f"{served}/v1/completions", json=body), 400, said)


@pytest.mark.parametrize("name", [*REFUSED, *OF_CHATS])
def test_refused_chats(name: str, served: str) -> None:
    changes, said = (REFUSED | OF_CHATS)[name]
    body = {"model": "tiny", "messages": TALK, **changes}
    refused(httpx.post(f"{served}/v1/chat/completions", json=body), 400, said)


def refused(answer: httpx.Response, status: int, said: str) -> None:
    """OpenAI's form of an error, with one sentence."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"3", b'{"prompt":', b"[" * 50_000, b'{"prompt": NaN}', HALF])
def test_bodies_that_are_nonsense(body: bytes, served: str) -> None:
    for path in ("completions", "chat/completions"):
        answer = httpx.post(f"{served}/v1/{path}", content=body)
        refused(answer, 400, "")


def test_other_paths_models_and_sizes(served: str, client: OpenAI) -> None:
    refused(httpx.get(f"{served}/v1/nothing"), 404, "GET /v1/nothing is not an endpoint")
    refused(httpx.get(f"{served}/v1/completions"), 405, "is not an endpoint")
    large = {"model": "tiny", "prompt": "a" * 100_000}
    refused(httpx.post(f"{served}/v1/completions", json=large), 413, "more than 100000 bytes")
    # Without its length in the header.
    pieces = (piece for piece in [b'{"prompt": "', b"a" * 100_000, b'"}'])
    refused(httpx.post(f"{served}/v1/completions", content=pieces), 413, "more than 100000 bytes")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; use 'tiny'"):
        client.completions.create(model="gpt-4", prompt="a")


def test_unknown_fields_are_ignored(served: str) -> None:
    body = {"prompt": "a", "temperature": 0, "user": "me", "metadata": {"a": 1}, "of_tomorrow": True, "best_of": None}
    assert httpx.post(f"{served}/v1/completions", json=body).status_code == 200


# Many clients, and clients that leave.


def endless(client: OpenAI, **more: Any) -> Any:
    """A stream that nearly fills the context. It is not read, apart from its first piece."""
    given: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 230, "stream": True, **more}
    stream = client.completions.create(extra_body={"ignore_eos": True}, **given)
    next(iter(stream))
    return stream


def test_a_client_that_leaves_frees_its_slot(client: OpenAI, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(model, monkeypatch)
    stream = endless(client, n=2)
    until(lambda: model.running == 2)
    stream.close()
    until(lambda: model.running == 0)


def test_a_client_that_does_not_wait_for_a_whole_answer(served: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(model, monkeypatch)
    body = {"prompt": PROMPT, "max_tokens": 230, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served}/v1/completions", json=body, timeout=0.5)
    until(lambda: model.running == 0)


def test_too_many_requests(client: OpenAI, served: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(model, monkeypatch)
    streams = [endless(client) for _ in range(SLOTS)]
    body = {"prompt": PROMPT, "max_tokens": 230, "ignore_eos": True, "n": WAITING, "stream": True}
    with httpx.stream("POST", f"{served}/v1/completions", json=body) as waiting:
        until(lambda: model.waiting == WAITING)
        answer = httpx.post(f"{served}/v1/completions", json={"prompt": "a"})
        refused(answer, 429, "8 requests are being answered or wait; send the request again later")
        assert answer.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="a")
        assert waiting.status_code == 200
    until(lambda: model.waiting == 0)  # the client that waited has left
    for stream in streams:
        stream.close()
    until(lambda: model.running == 0)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices[0].finish_reason == "length"


def slow(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step take a while, so that an answer has not ended before the test looks at it."""
    step = model.scheduler.step

    def slower() -> None:
        time.sleep(0.02)
        step()

    monkeypatch.setattr(model.scheduler, "step", slower)


# The state of the server.


def test_metrics_and_health(client: OpenAI, served: str) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{served}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    names = {
        'rq_requests_total{endpoint="/v1/completions",status="200"}': 1,
        'rq_requests_total{endpoint="/v1/completions",status="400"}': 1,
        "rq_prompt_tokens_total": 3,
        "rq_generation_tokens_total": 5,
        "rq_time_to_first_token_seconds_count": 1,
        "rq_inter_token_latency_seconds_count": 4,
        "rq_e2e_request_latency_seconds_count": 1,
    }
    before = {name: value(name) for name in names}
    client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=5, extra_body={"ignore_eos": True})
    httpx.post(f"{served}/v1/completions", content=b"{")
    assert {name: value(name) - before[name] for name in names} == names
    assert value("rq_num_requests_running") == value("rq_num_requests_waiting") == 0
    assert httpx.get(f"{served}/health").status_code == 200


def test_an_engine_that_fails_ends_its_answers(client: OpenAI, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.scheduler._model, "step", fail)
        with pytest.raises(openai.InternalServerError, match="the engine failed: out of memory"):
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.completions.create(model="tiny", prompt="a", stream=True))
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices[0].finish_reason


def test_a_model_without_a_chat_template(stages: Path) -> None:
    """And what happens to answers when the server ends."""
    base = ServedModel(rq.load(stages / "model.onnx", threads=1), "base", slots=1, max_length=None, max_waiting=1)
    servers = running(base)
    address = next(servers)
    refused(
        httpx.post(f"{address}/v1/chat/completions", json={"messages": TALK}), 400, "has no chat template; use /v1/completions"
    )
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    with pytest.raises(StopIteration):
        next(servers)
    assert not base.healthy
    host, port = address.removeprefix("http://").split(":")
    with pytest.raises(ConnectionError):
        socket.create_connection((host, int(port)), 2)


def test_a_server_whose_model_has_ended_refuses_with_503(engine: rq.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is under way, one that waits, and those that come later."""
    ending = ServedModel(engine, "ending", slots=1, max_length=None, max_waiting=2)
    slow(ending, monkeypatch)
    servers = running(ending)
    address = next(servers)

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 230, "ignore_eos": True})

    with ThreadPoolExecutor(2) as clients:
        answers = clients.map(ask, range(2))
        until(lambda: (ending.running, ending.waiting) == (1, 1))
        ending.scheduler.close()
        told = [*answers, ask(2)]
    for answer in told:
        refused(answer, 503, "the model was unloaded before the answer was complete; send the request again")
        assert answer.headers["retry-after"] == "1"
    assert httpx.get(f"{address}/health").status_code == 503
    with pytest.raises(StopIteration):
        next(servers)


def test_every_event_is_one_line_of_json(served: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "stream": True}
    lines = httpx.post(f"{served}/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:
        assert json.loads(line.removeprefix("data: "))["object"] == "text_completion"
