"""Options that say how tokens are chosen, for commands that generate text. Their names are those of vLLM's ``SamplingParams``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from rq_compile.errors import UserError

if TYPE_CHECKING:
    from rq_compile.standalone.sampling import SamplingParams

Given = Mapping[str, Any]
# Name of the parameter -> the rest of its option.
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"type": float, "help": "Divide the logits by this number; 0 always takes the most likely token."},
    "top_k": {"type": int, "help": "Draw from this many most likely tokens."},
    "top_p": {"type": float, "help": "Draw from the most likely tokens that together have this probability."},
    "min_p": {"type": float, "help": "Draw from tokens that are at least this many times as likely as the most likely one."},
    "repetition_penalty": {"type": float, "help": "Above 1: make tokens of the prompt and the answer less likely."},
    "presence_penalty": {"type": float, "help": "Above 0: make tokens of the answer less likely."},
    "frequency_penalty": {"type": float, "help": "Above 0: make tokens less likely each time that they occur."},
    "seed": {"type": int, "help": "The same seed gives the same answer."},
    "stop": {"multiple": True, "metavar": "TEXT", "help": "End before this text; repeatable."},
    "logit_bias": {"multiple": True, "metavar": "ID=BIAS", "help": "Add BIAS to the logit of a token id; repeatable."},
    "ignore_eos": {"is_flag": True, "help": "Treat the model's end-of-text tokens like other tokens."},
}


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options. It gets the given ones as one argument, ``sampling``, for ``chosen``."""

    @functools.wraps(command)
    def with_sampling(*positional: Any, **named: Any) -> None:
        values = {name: named.pop(name) for name in OPTIONS}
        given = {name: value for name, value in values.items() if value is not None and value is not False and value != ()}
        command(*positional, sampling=given, **named)

    for name, settings in reversed(OPTIONS.items()):
        with_sampling = click.option(f"--{name.replace('_', '-')}", name, **settings)(with_sampling)
    return with_sampling


def chosen(given: Given, defaults: Given, vocabulary: int, **more: Any) -> SamplingParams:
    """The given options, and otherwise the engine's ``defaults``. ``more`` are further parameters.

    Raises:
        UserError: a value is out of range.
    """
    from rq_compile.standalone.sampling import SamplingError, sampling_params

    values = dict(given)
    if "logit_bias" in values:
        values["logit_bias"] = dict(_bias(pair) for pair in values["logit_bias"])
    try:
        params = sampling_params({**values, **more}, defaults)
        params.check_tokens(vocabulary)
    except SamplingError as error:
        name, _, rest = str(error).partition(" ")
        fault, _, way_out = rest.partition("; ")
        raise UserError(f"--{name.replace('_', '-')} {fault}; {way_out}", 2) from error
    return params


def _bias(pair: str) -> tuple[int, float]:
    token, equals, bias = pair.partition("=")
    try:
        if not equals:
            raise ValueError
        return int(token), float(bias)
    except ValueError as error:
        raise UserError(f"--logit-bias {pair!r} is not ID=BIAS; write for example --logit-bias 17=-100", 2) from error
