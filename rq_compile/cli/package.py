"""``rq-compile package``: what it takes to deploy an engine, in one folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, get_args

import click

from rq_compile.cli.options import FILE
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError
from rq_compile.packaging.package import Destination

# The module of ``rq_compile.packaging`` that makes each destination's package.
MODULES: dict[Destination, str] = {}
# The destinations that an option is for.
OPTIONS: dict[str, tuple[Destination, ...]] = {}


@click.command("package")
@click.argument("engine", type=FILE)
@click.option("--for", "destination", type=click.Choice(get_args(Destination)), required=True, help="What is to run it.")
@click.option("-o", "--output", type=FILE, required=True, help="The folder to write.")
@on_screen
def command(screen: Screen, engine: Path, destination: Destination, output: Path, **options: Any) -> None:
    """Put ENGINE into a folder that a server or device can start from."""
    given = {name: value for name, value in options.items() if was_given(name)}
    for name in given:
        if destination not in OPTIONS[name]:
            raise UserError(f"--{name} has no effect with --for {destination}; leave one of the two out", 2)

    from rq_compile.cli.tables import package_tables

    package = importlib.import_module(f"rq_compile.packaging.{MODULES[destination]}").package
    result = package(engine, output, **given)
    screen.note(f"wrote {output}")
    screen.result(result, *package_tables(result))


def was_given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
