"""The server refuses what it cannot answer in OpenAI's form, with one sentence."""

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from served import TALK, refused

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
