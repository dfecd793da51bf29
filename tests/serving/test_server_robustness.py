"""The server frees what is no longer wanted, counts what it does, and survives an engine that fails or ends."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from served import PROMPT, SLOTS, TALK, WAITING, refused, running, slow, until

import rq_compile as rq
from rq_compile.serving.served_model import ServedModel

# Clients that leave


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


# The state of the server


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
