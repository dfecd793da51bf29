"""A server in a thread of the tests, its clients, and the form of its refusals."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

import rq_compile as rq
from rq_compile.serving.app import application
from rq_compile.serving.served_model import ServedModel
from rq_compile.serving.server import Server, listening, url

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


def refused(answer: httpx.Response, status: int, said: str) -> None:
    """OpenAI's form of an error, with one sentence."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]


def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def slow(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step take a while, so that an answer has not ended before the test looks at it."""
    step = model.scheduler.step

    def slower() -> None:
        time.sleep(0.02)
        step()

    monkeypatch.setattr(model.scheduler, "step", slower)
