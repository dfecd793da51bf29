"""Options that several commands share, and checks that must come before the long work.

The choices repeat those of the schemas, so that ``--help`` does not have to import them. A test keeps the two equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from rq_compile.calibration.lengths import BATCH_SIZE, BATCH_TOKENS, SEQUENCE_LENGTH, TOKENS
from rq_compile.errors import UserError

POLICIES = ("none", "paper", "eplb", "craft", "place", "uniform", "frequency", "random", "optimal")
QUANTIZERS = ("gptq", "nearest")
BLOCKS = ("auto", "128", "64", "32", "16")
MEASURABLE_FORMATS = ("int8", "int4", "int3", "int2", "constant")
DENSE_FORMATS = ("stored", "int8", "int4", "fp32")

FILE = click.Path(path_type=Path)


class ByteSize(click.ParamType):
    """A number of bytes. ``16G`` and ``16GiB`` are 16 x 2**30, ``1.5G`` is valid, and plain digits are bytes.

    ``16GB`` is refused, because its unit may mean 10**9 or 2**30.
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


class FormatList(click.ParamType):
    """Formats that a calibration measures, separated by commas."""

    name = "formats"

    def convert(self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        formats = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        if wrong := [name for name in formats if name not in MEASURABLE_FORMATS]:
            self.fail(
                f"{wrong[0]!r} cannot be measured; write some of {', '.join(MEASURABLE_FORMATS)}, separated by commas",
                param,
                ctx,
            )
        return formats


class WeightedFile(click.ParamType):
    """A file, or ``FILE:WEIGHT``: the file and a positive number. A file whose name ends like a weight is taken as it is."""

    name = "file[:weight]"

    def convert(
        self, value: str | tuple[Path, float | None], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float | None]:
        if isinstance(value, tuple):
            return value
        file, colon, weight = value.rpartition(":")
        if not colon or Path(value).exists():
            return Path(value), None
        try:
            number = float(weight)
        except ValueError:
            return Path(value), None
        if not 0 < number <= MOST_WEIGHT:
            self.fail(f"the weight of {value} is not above 0 and up to {MOST_WEIGHT:g}; write for example {file}:3", param, ctx)
        return Path(file), number


def each_once(
    context: click.Context, param: click.Parameter, files: tuple[tuple[Path, float | None], ...]
) -> dict[Path, float | None]:
    """The weights of the files, None where none was given."""
    weights = dict(files)
    if len(weights) < len(files):
        twice = next(path for path in weights if sum(path == file for file, _ in files) > 1)
        raise click.BadParameter(f"{twice} is given more than once and would count more than once; give each once")
    return weights


MOST_WEIGHT = 1e6
SIZE = ByteSize()
Decorator = Callable[[Callable[..., None]], Callable[..., None]]

calibrations_argument = click.argument(
    "calibrations", metavar="CALIBRATION[:WEIGHT]...", type=WeightedFile(), nargs=-1, required=True, callback=each_once
)
text_option = click.option(
    "--text", "texts", type=FILE, multiple=True, help="A text file (.txt, .jsonl, .parquet) or a pattern; repeatable."
)
tokens_option = click.option(
    "--tokens",
    type=click.IntRange(2),
    default=TOKENS,
    show_default=True,
    help="Run at most so many tokens, the first of every text; of long texts equally many.",
)
batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(1),
    help=f"Sequences that run together. Default: up to {BATCH_SIZE}, of {BATCH_TOKENS} tokens in all.",
)
sequence_length_option = click.option(
    "--sequence-length",
    type=click.IntRange(2),
    help=f"Tokens of a sequence. Default: {SEQUENCE_LENGTH}, or as many as the model has positions.",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only estimate disk space, memory and (roughly) time; weights are not read."
)
threads_option = click.option("--threads", type=click.IntRange(1), help="Number of threads; default: the runtime's choice.")


def planning_options(function: Callable[..., None]) -> Callable[..., None]:
    options: list[Decorator] = [
        click.option("--policy", type=click.Choice(POLICIES), default="optimal", show_default=True, help="The planning policy."),
        click.option(
            "--memory",
            type=click.FloatRange(0, min_open=True),
            help="Bytes that the plan may take, as a multiple of the experts' bytes in the checkpoint. Default: 1.0, or the "
            "least that works if a quantized checkpoint is smaller than any plan.",
        ),
        click.option(
            "--engine-bytes",
            type=SIZE,
            help="Bytes of the engine's weights file, instead of --memory: the plan then also decides the formats of the "
            "non-expert weights (18G).",
        ),
        click.option(
            "--objective",
            type=click.Choice(["error", "bytes-read"]),
            help="What policy optimal minimises: the predicted error (the default), or the bytes that a token reads within "
            "--option max_error.",
        ),
        click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Devices that share the experts."),
        click.option(
            "--mixed-copies",
            is_flag=True,
            help="Let copies of an expert differ in format, as in the paper: an answer then depends on the rest of its batch.",
        ),
        click.option(
            "--option", "policy_options", multiple=True, metavar="KEY=VALUE", help="An option of the policy; repeatable."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def parse_options(
    pairs: tuple[str, ...], *, policy: str, mixed_copies: bool = False, objective: str | None = None
) -> dict[str, Any]:
    """The options of a policy, from ``key=value`` pairs and those with an own option of the command line. Values that are valid
    JSON are parsed.

    Raises:
        UserError: a pair has no ``=`` or repeats an own option, or ``policy`` does not have that option.
    """
    if mixed_copies and policy != "optimal":
        raise UserError(f"--mixed-copies has no effect with --policy {policy}; leave one of the two out", 2)
    if objective is not None and policy != "optimal":
        raise UserError(f"--objective {objective} has no effect with --policy {policy}; leave one of the two out", 2)
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--option {pair} is not KEY=VALUE; write for example --option fraction=0.5", 2)
        if key == "mixed_copies":
            raise UserError(f"--option {pair} is given by a flag; give --mixed-copies, or leave it out", 2)
        if key == "objective" and objective is not None:
            raise UserError(f"--option {pair} and --objective {objective} are given; leave one of the two out", 2)
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed | ({"mixed_copies": True} if mixed_copies else {}) | ({"objective": objective} if objective else {})


def given_options() -> dict[str, str]:
    """Parameter -> its option (``--text``), for the options that were given on the command line."""
    context = click.get_current_context()
    return {
        parameter.name: parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) == click.core.ParameterSource.COMMANDLINE
    }
