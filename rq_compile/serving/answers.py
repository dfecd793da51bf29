"""Answers in the form of OpenAI's objects, whole and as the chunks of a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from time import time
from typing import Any
from uuid import uuid4

from rq_compile.serving.reply import Piece
from rq_compile.standalone.sampling import Choice

TokenText = Callable[[int], str]
# JSON has no infinity; vLLM uses this value, too.
LEAST_LOGPROB = -9999.0


class Answers(ABC):
    """The objects of one request. ``object``, ``chunk``: their kinds, whole and as a chunk. ``prefix``: of the id. With
    ``token_ids``, the choices state their tokens, as in vLLM."""

    object: str
    chunk: str
    prefix: str

    def __init__(self, model: str, token_text: TokenText, logprobs: bool, token_ids: bool) -> None:
        self._token_text = token_text
        self._logprobs, self._token_ids = logprobs, token_ids
        self._id, self._created, self._model = f"{self.prefix}-{uuid4().hex}", int(time()), model

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """``pieces``: those of each choice."""
        return self._object(self.object, [self._whole_choice(index, ones) for index, ones in enumerate(pieces)], usage=usage)

    def first(self, choices: int) -> list[dict[str, Any]]:
        """The chunks before the first piece."""
        return []

    def piece(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk of ``piece``; None if it has nothing to say."""
        if not (piece.text or piece.finish_reason or self._logprobs or self._token_ids):
            return None
        return self._object(self.chunk, [self._with_ids(self._part(piece), piece.choices)])

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream with ``include_usage``."""
        return self._object(self.chunk, [], usage=usage)

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices, **more}

    def _whole_choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        choices = [choice for piece in pieces for choice in piece.choices]
        return self._with_ids(self._choice(index, text, choices, pieces[-1].finish_reason), choices)

    def _with_ids(self, choice: dict[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
        return {**choice, "token_ids": [each.token for each in choices]} if self._token_ids else choice

    @abstractmethod
    def _choice(self, index: int, text: str, choices: Sequence[Choice], finish_reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, piece: Piece) -> dict[str, Any]: ...


class Completions(Answers):
    object = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, token_text: TokenText, logprobs: bool, token_ids: bool, echoed: Sequence[str] = ()) -> None:
        """``echoed``: the texts that precede the choices; none if they are not echoed."""
        super().__init__(model, token_text, logprobs, token_ids)
        self._echoed = echoed
        self._offsets: dict[int, int] = {}

    def first(self, choices: int) -> list[dict[str, Any]]:
        return [self._object(self.chunk, [self._choice(index, "", (), None)]) for index in range(choices) if self._echoed]

    def _part(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece.index, piece.text, piece.choices, piece.finish_reason)

    def _choice(self, index: int, text: str, choices: Sequence[Choice], finish_reason: str | None) -> dict[str, Any]:
        if self._echoed and index not in self._offsets:
            text = self._echoed[index] + text
        logprobs = self._log_probabilities(index, choices) if self._logprobs else None
        self._offsets.setdefault(index, 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _log_probabilities(self, index: int, choices: Sequence[Choice]) -> dict[str, Any]:
        tokens = [self._token_text(choice.token) for choice in choices]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(choice.logprob) for choice in choices],
            # As in vLLM, the chosen token is always among them.
            "top_logprobs": [
                {self._token_text(token): _finite(value) for token, value in (*choice.top, (choice.token, choice.logprob))}
                for choice in choices
            ],
            "text_offset": offsets,
        }


class ChatCompletions(Answers):
    object = "chat.completion"
    chunk = "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self, choices: int) -> list[dict[str, Any]]:
        return [self._object(self.chunk, [self._delta(index, {"role": "assistant", "content": ""})]) for index in range(choices)]

    def _choice(self, index: int, text: str, choices: Sequence[Choice], finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, **self._end(choices, finish_reason)}

    def _part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {**self._delta(piece.index, delta), **self._end(piece.choices, piece.finish_reason)}

    def _delta(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _end(self, choices: Sequence[Choice], finish_reason: str | None) -> dict[str, Any]:
        logprobs = {"content": [self._log_probability(choice) for choice in choices]} if self._logprobs else None
        return {"logprobs": logprobs, "finish_reason": finish_reason}

    def _log_probability(self, choice: Choice) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in choice.top]
        return {**self._token(choice.token, choice.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)
