"""How the next token of a sequence is chosen: the most likely one, or a draw. Names and meanings are those of vLLM's
``SamplingParams``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

# Temperatures below this are greedy, as in vLLM.
GREEDY_BELOW = 1e-5
MOST_LOGPROBS = 20
LARGEST_BIAS = 100.0
# Parameters that have no effect on a greedy choice.
DRAWN = {"top_k", "top_p", "min_p", "seed"}
# Tokens that are sorted first for ``top_p``. More are only sorted if these are not likely enough.
HEAD = 1024


class SamplingError(ValueError):
    """A parameter that is out of range: one sentence with its name, its value and what to give instead."""


class Choice(NamedTuple):
    """A chosen token. ``logprob`` and ``top`` are natural logarithms of the model's probabilities, before penalties and
    temperature, as in vLLM. ``logprob`` is None and ``top`` is empty unless ``SamplingParams.logprobs`` asks for them.

    ``top``: the most likely tokens, each with its logarithm, in descending order.
    """

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a text ends. All values are checked, and strings and lists are stored as tuples.

    Raises:
        SamplingError: a value has the wrong type or is out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most likely token."""
    top_k: int = 0
    """Only this many most likely tokens are drawn from; 0 or -1 for all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens whose probabilities sum to at least ``top_p`` are drawn from."""
    min_p: float = 0.0
    """Only tokens at least ``min_p`` times as likely as the most likely one are drawn from."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the answer are divided by it if they are positive, and multiplied otherwise."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer, for each time that they occur."""
    seed: int | None = None
    """The same seed gives the same answer; None for another one each time."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they do not belong to it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, besides the model's own."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, before the penalties: -100 to 100."""
    logprobs: int | None = None
    """How many of the most likely tokens are returned with their log probabilities; None for no log probabilities at all."""
    max_tokens: int | None = 16
    """The most tokens of an answer; None for as many as the sequence has room for."""
    ignore_eos: bool = False
    """Whether the model's own end-of-text tokens are tokens like others."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 1e6)
        _check("top_k", self.top_k, -1, 2**31 - 1, whole=True)
        _check("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise SamplingError("top_p is 0; give a number above 0 and at most 1")
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**63 - 1, whole=True)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, MOST_LOGPROBS, whole=True)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 1, 2**31 - 1, whole=True)
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos is {_shown(self.ignore_eos)}; give true or false")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def ends(self, end_of_text: Collection[int]) -> frozenset[int]:
        """The tokens that end an answer of a model whose own such tokens are ``end_of_text``."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else end_of_text)

    def check_tokens(self, vocabulary: int) -> None:
        """
        Raises:
            SamplingError: ``logit_bias`` or ``stop_token_ids`` names a token outside a vocabulary of this size.
        """
        for name in ("logit_bias", "stop_token_ids"):
            if (highest := max(getattr(self, name), default=0)) >= vocabulary:
                raise SamplingError(f"{name} names the token {highest}; give tokens of 0 to {vocabulary - 1}")


def sampling_params(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a request: those ``given`` by their names and not None, otherwise the engine's ``defaults`` (``sampling``
    in its manifest). A request that restricts or seeds a draw without a temperature has temperature 1, even if the engine is
    greedy.

    Raises:
        SamplingError: see ``SamplingParams``.
    """
    stated = {name: value for name, value in given.items() if value is not None}
    params = SamplingParams(**{**defaults, **stated})
    if "temperature" in stated or not params.greedy or not stated.keys() & DRAWN:
        return params
    return replace(params, temperature=1.0)


class Sampler:
    """Chooses the tokens of one sequence. Its random numbers are its own, so an answer with a seed does not depend on other
    sequences."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        """``prompt_ids``: the tokens before the answer, which ``repetition_penalty`` counts as repeated."""
        self.params = params
        self._prompt = np.unique(np.asarray(prompt_ids, np.int64)) if params.penalized else np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)  # of each token in the answer
        # numpy's seeds are not negative.
        seed = None if params.seed is None else params.seed % 2**64
        self._random = None if params.greedy else np.random.default_rng(seed)

    def choose(self, logits: np.ndarray) -> Choice:
        """The next token, which becomes part of the sequence. ``logits``: fp32 ``[vocabulary]``; they are not changed.

        Raises:
            ArithmeticError: the logits are not finite.
        """
        adjusted = self._adjusted(logits)
        token = int(adjusted.argmax())
        if not math.isfinite(adjusted[token]):
            raise ArithmeticError(f"the logit of token {token} is {adjusted[token]}, which is not finite")
        if self._random is not None:
            ids, probabilities = distribution(adjusted, self.params)
            bounds = probabilities.cumsum()
            place = int(bounds.searchsorted(self._random.random() * bounds[-1], side="right"))
            token = int(ids[min(place, len(ids) - 1)])
        if self.params.penalized:
            self._counts[token] += 1
        return Choice(token) if self.params.logprobs is None else _with_logprobs(token, logits, self.params.logprobs)

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """The logits with biases and penalties, in the order of vLLM."""
        params = self.params
        if not params.logit_bias and not params.penalized:
            return logits
        logits = logits.astype(np.float32)
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        if params.penalized:
            if len(self._counts) == 0:
                self._counts = np.zeros(len(logits), np.int64)
            seen = self._counts > 0
            repeated = seen.copy()
            repeated[self._prompt] = True
            factor = np.float32(params.repetition_penalty)
            logits[repeated] = np.where(logits[repeated] > 0, logits[repeated] / factor, logits[repeated] * factor)
            logits -= (params.frequency_penalty * self._counts + params.presence_penalty * seen).astype(np.float32)
        return logits


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that can be drawn (int64, ascending) and their probabilities (float64), from logits ``[vocabulary]``.

    The order is that of vLLM: temperature, then ``min_p`` and ``top_k``, then ``top_p`` of what these leave. Tokens that are
    equally likely as the last one within ``top_k`` are kept, too.
    """
    ids = np.arange(len(logits))
    if 0 < params.top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -params.top_k)[-params.top_k])
    kept = logits[ids].astype(np.float64)
    weights = np.exp((kept - kept.max()) / params.temperature)
    if params.min_p > 0:
        likely = weights >= params.min_p
        ids, weights = ids[likely], weights[likely]
    if params.top_p < 1:
        inside = _nucleus(weights, params.top_p * weights.sum())
        ids, weights = ids[inside], weights[inside]
    return ids, weights / weights.sum()


def _nucleus(weights: np.ndarray, share: float) -> np.ndarray:
    """The places of the fewest largest ``weights`` that sum to at least ``share``, ascending."""
    for count in (HEAD, 16 * HEAD, len(weights)):
        largest = np.argpartition(weights, -count)[-count:] if count < len(weights) else np.arange(len(weights))
        largest = largest[np.argsort(-weights[largest], kind="stable")]
        before = np.concatenate([[0.0], weights[largest].cumsum()[:-1]])
        if before[-1] >= share or len(largest) == len(weights):
            break
    return np.sort(largest[before < share])


def _with_logprobs(token: int, logits: np.ndarray, count: int) -> Choice:
    exact = logits.astype(np.float64)
    peak = exact.max()
    exact -= peak + np.log(np.exp(exact - peak).sum())
    best = np.argpartition(-exact, min(count, len(exact) - 1))[:count]
    best = best[np.lexsort((best, -exact[best]))]
    return Choice(token, float(exact[token]), [(int(one), float(exact[one])) for one in best])


def _check(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "whole number" if whole else "number"
        raise SamplingError(f"{name} is {_shown(value)}; give a {kind} of {least:.15g} to {most:.15g}")


def _stop_strings(given: Any) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else None
    if strings is None or not all(isinstance(string, str) and string for string in strings):
        raise SamplingError(f"stop is {_shown(given)}; give a string or a list of strings, none of them empty")
    return strings


def _token_ids(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list | tuple) or not all(_is_token(token) for token in given):
        raise SamplingError(f"stop_token_ids is {_shown(given)}; give a list of token ids")
    return tuple(map(int, given))


def _biases(given: Any) -> dict[int, float]:
    try:
        # JSON has only strings as keys.
        biases = {int(token): bias for token, bias in given.items()}
    except (AttributeError, TypeError, ValueError):
        biases = None
    if biases is None or not all(map(_is_token, biases)):
        raise SamplingError(f"logit_bias is {_shown(given)}; give token ids with numbers of -100 to 100")
    for token, bias in biases.items():
        _check(f"logit_bias of token {token}", bias, -LARGEST_BIAS, LARGEST_BIAS)
    return biases


def _is_token(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | np.integer) and int(value) >= 0


def _shown(value: Any) -> str:
    return ascii(value)[:60]


GREEDY = SamplingParams(temperature=0.0)
