"""``rq-compile package``: what it takes to deploy an engine, in one folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rq_compile.cli.options import FILE, given_options
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError

if TYPE_CHECKING:
    from rq_compile.packaging.package import Destination

# The module of ``rq_compile.packaging`` that makes each destination's package.
MODULES: dict[Destination, str] = {
    "edge": "edge",
    "tensorrt-llm": "tensorrt_llm",
    "sglang": "sglang",
    "vllm": "vllm",
    "vllm-ascend": "vllm_ascend",
}
# The destinations that an option is for.
OPTIONS: dict[str, tuple[Destination, ...]] = {"layers": ("sglang",)}


@click.command("package")
@click.argument("engine", type=FILE)
@click.option("--for", "destination", type=click.Choice(list(MODULES)), required=True, help="What is to run it.")
@click.option("-o", "--output", type=FILE, required=True, help="The folder to write.")
@click.option("--layers", type=click.IntRange(1), help="sglang: decoder layers of the model, dense ones included.")
@on_screen
def command(screen: Screen, engine: Path, destination: Destination, output: Path, **options: Any) -> None:
    """Put ENGINE into a folder that a server or device can start from.

    For the cluster servers (tensorrt-llm, sglang, vllm, vllm-ascend) ENGINE may be a plan.json: they load the checkpoint
    themselves and take the placement of its experts.
    """
    given = {name: option for name, option in given_options().items() if name in OPTIONS}
    for name, option in given.items():
        if destination not in OPTIONS[name]:
            raise UserError(f"{option} has no effect with --for {destination}; leave one of the two out", 2)

    from rq_compile.cli.tables import package_tables

    package = importlib.import_module(f"rq_compile.packaging.{MODULES[destination]}").package
    result = package(engine, output, **{name: options[name] for name in given})
    screen.note(f"wrote {output}")
    screen.result(result, *package_tables(result))
