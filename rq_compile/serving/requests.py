"""The bodies of requests. As in vLLM, unknown fields are ignored. Fields of OpenAI's API that would change the answer, but are
not supported, are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from rq_compile.serving.refusals import Refusal
from rq_compile.standalone.sampling import SamplingError, SamplingParams, sampling_params
from rq_compile.violations import violation

# Fields that SamplingParams calls by the same name, and checks.
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "ignore_eos",
)


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completions have in common."""

    unsupported: ClassVar[tuple[str, ...]] = ()

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    max_tokens: int | None = None
    sampling: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _sorted(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body is not a JSON object; send one")
        for name in cls.unsupported:
            if body.get(name) not in (None, False, [], {}, "none"):
                raise ValueError(f"{name} is not supported; leave it out")
        if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
            raise ValueError("response_format is not supported; leave it out")
        stated = {name: value for name, value in body.items() if value is not None}
        return {**stated, "sampling": {name: stated[name] for name in SAMPLING if name in stated}}

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for streams; set stream to true, or leave it out")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def log_probabilities(self) -> int | None:
        """How many of the most likely tokens are returned with their log probabilities; None for none at all."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer; None for as many as there is room for."""
        return self.max_tokens

    def params(self, defaults: Mapping[str, Any], choice: int = 0) -> SamplingParams:
        """The parameters of one of the ``n`` choices. With a seed, each has its own, as in vLLM.

        Raises:
            Refusal: a value is out of range.
        """
        values = dict(self.sampling)
        if isinstance(seed := values.get("seed"), int) and not isinstance(seed, bool):
            values["seed"] = seed + choice
        try:
            params = sampling_params({**values, "logprobs": self.log_probabilities}, defaults)
            return replace(params, max_tokens=self.longest)
        except SamplingError as error:
            raise Refusal(400, str(error), str(error).split(" ")[0]) from error


class CompletionRequest(Request):
    unsupported = ("suffix",)

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.prompt and isinstance(self.prompt, list):
            raise ValueError("prompt is an empty list; give at least one text")
        if self.best_of not in (None, 1, self.n):
            raise ValueError("best_of is not supported; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of an echoed prompt are not supported; leave out echo or logprobs")
        return self

    @property
    def log_probabilities(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class ChatRequest(Request):
    unsupported = ("tools", "functions", "audio", "prediction", "web_search_options")

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs; set logprobs to true, or leave it out")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message contradicts add_generation_prompt; set the latter to false")
        for message in self.messages:
            if not isinstance(message.get("role"), str):
                raise ValueError("a message has no role; give each a role and a content")
        return self

    @property
    def log_probabilities(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages, with parts of text joined, as most templates take only text.

        Raises:
            Refusal: a message has a part that is not text.
        """
        return [{**message, "content": _text(message.get("content"))} for message in self.messages]


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Refusal(400, f"a message has content of type {ascii(kind)[:40]}; this model reads text only", "messages")
    return "\n".join(part["text"] for part in parts)


def parsed(kind: type[Request], body: bytes) -> Any:
    """The request of ``kind`` in ``body``.

    Raises:
        Refusal: the body is not JSON, or a field is missing, has another type or is not supported.
    """
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()
        return kind.model_validate(content)
    except UnicodeEncodeError as error:
        raise Refusal(400, "the body has half of a UTF-16 surrogate pair; send whole characters") from error
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise Refusal(400, "the body is not JSON; send a JSON object in UTF-8") from error
    except ValidationError as error:
        place = error.errors(include_url=False)[0]["loc"]
        raise Refusal(400, violation(error), str(place[0]) if place else None) from error
