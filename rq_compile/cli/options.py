"""Options that several commands share, and checks that must come before the long work.

The choices repeat the schemas' so that ``--help`` need not import them; a test holds them equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from rq_compile.errors import UserError

POLICIES = ("none", "paper", "eplb", "craft", "place", "uniform", "frequency", "random", "optimal")
QUANTIZERS = ("gptq", "nearest")
BLOCKS = ("auto", "128", "64", "32", "16")
DENSE_FORMATS = ("stored", "int8", "fp32")

FILE = click.Path(path_type=Path)


class ByteSize(click.ParamType):
    """Bytes: ``16G`` or ``16GiB`` is 16 x 2**30; K, M, G and T count in 1024s; ``1.5G`` is taken, plain digits are bytes.

    ``16GB`` is refused: some read it as 10**9s, others as 2**30s.
    """

    name = "size"
    UNITS = ("", "K", "M", "G", "T")

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        written = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?:([KMGT])(?:iB)?)?", value.strip(), re.IGNORECASE | re.ASCII)
        if written is None:
            self.fail(f"{value!r} is not a size; write bytes or a unit of 1024s, for example 16G, 512M or 1.5GiB", param, ctx)
        size = int(Fraction(written[1]) * 1024 ** self.UNITS.index((written[2] or "").upper()))
        if size == 0:
            self.fail(f"{value!r} is less than one byte; write for example 16G, 512M or 1.5GiB", param, ctx)
        return size


SIZE = ByteSize()
Decorator = Callable[[Callable[..., None]], Callable[..., None]]

text_option = click.option(
    "--text", "texts", type=FILE, multiple=True, help="A file to run (.txt, .jsonl, .parquet), or a pattern; repeatable."
)
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences that run together."
)
sequence_length_option = click.option(
    "--sequence-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a sequence."
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only say what disk, memory and, roughly, time it would take; read no weights."
)
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads; default: the runtime's choice.")


def planning_options(function: Callable[..., None]) -> Callable[..., None]:
    options: list[Decorator] = [
        click.option("--policy", type=click.Choice(POLICIES), default="optimal", show_default=True, help="How to decide."),
        click.option(
            "--memory",
            type=click.FloatRange(0, min_open=True),
            help="Bytes the plan may take, as a multiple of the experts' bytes in the checkpoint. Default: 1.0, or the least "
            "that works where a quantized checkpoint takes fewer.",
        ),
        click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Devices that share the experts."),
        click.option(
            "--mixed-copies",
            is_flag=True,
            help="Let copies of an expert differ in format, as in the paper: an answer then depends on who shares its batch.",
        ),
        click.option("--option", "policy_options", multiple=True, metavar="KEY=VALUE", help="A policy's own option; repeatable."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def parse_options(pairs: tuple[str, ...], *, policy: str, mixed_copies: bool) -> dict[str, Any]:
    """What a policy is given: ``key=value`` pairs, of which a value that reads as a JSON number or boolean is one, and the flag.

    Raises:
        UserError: a pair has no ``=`` or repeats the flag, or ``policy`` does not have it.
    """
    if mixed_copies and policy != "optimal":
        raise UserError(f"--mixed-copies has no effect with --policy {policy}; leave one of the two out", 2)
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--option {pair} is not KEY=VALUE; write for example --option fraction=0.5", 2)
        if key == "mixed_copies":
            raise UserError(f"--option {pair} has a flag of its own; give --mixed-copies, or leave it out", 2)
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed | ({"mixed_copies": True} if mixed_copies else {})


def given_options() -> dict[str, str]:
    """Parameter -> its option (``--text``), for those that stand on the command line and do not have their defaults."""
    context = click.get_current_context()
    return {
        parameter.name: parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) == click.core.ParameterSource.COMMANDLINE
    }
