"""The parameters of a request that arrive as arrays, as from Triton: their names, kinds and shapes, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .sampling import SamplingError, SamplingParams, sampling_params

TEXT = object
# Name -> dtype and number of values; -1 for any number. The names are those of SamplingParams. ``logit_bias`` is a JSON object.
PARAMETERS: dict[str, tuple[type, int]] = {
    "temperature": (np.float32, 1),
    "top_k": (np.int32, 1),
    "top_p": (np.float32, 1),
    "min_p": (np.float32, 1),
    "repetition_penalty": (np.float32, 1),
    "presence_penalty": (np.float32, 1),
    "frequency_penalty": (np.float32, 1),
    "seed": (np.int64, 1),
    "stop": (TEXT, -1),
    "stop_token_ids": (np.int64, -1),
    "logit_bias": (TEXT, 1),
    "logprobs": (np.int32, 1),
    "ignore_eos": (np.bool_, 1),
}


def request_params(given: Mapping[str, np.ndarray | None], defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
    """``given``: the arrays of ``PARAMETERS`` that the request has. ``defaults``: ``sampling`` in the engine's manifest.

    Raises:
        SamplingError: a value has another number of elements, is not UTF-8, or is out of range.
    """
    values = {name: _value(name, array) for name, array in given.items() if array is not None}
    return sampling_params({**values, "max_tokens": max_tokens}, defaults)


def messages_of(text: str) -> list[dict[str, Any]]:
    """A conversation that is given as JSON.

    Raises:
        SamplingError: it is not a list of objects, each with a role.
    """
    try:
        messages = json.loads(text)
        json.dumps(messages, ensure_ascii=False).encode()  # not with half of a surrogate pair
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise SamplingError('messages is not a conversation; give JSON such as [{"role": "user", "content": "Hello"}]')
    return messages


def _value(name: str, array: np.ndarray) -> Any:
    kind, count = PARAMETERS[name]
    values = [_text(name, value) if kind is TEXT else _number(value) for value in array.ravel()]
    if count == -1:
        return values
    if len(values) != 1:
        raise SamplingError(f"{name} has {len(values)} values; give one")
    if name != "logit_bias":
        return values[0]
    try:
        return json.loads(values[0])
    except (ValueError, RecursionError):
        raise SamplingError("logit_bias is not JSON; give a JSON object of token ids and numbers") from None


def _number(value: Any) -> Any:
    # The shortest decimal number is the one that the client wrote: 0.7, not 0.699999988.
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def _text(name: str, value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise SamplingError(f"{name} is not UTF-8; give text in UTF-8") from None
