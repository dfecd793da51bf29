"""``rq-compile merge``: make one calibration from several calibrations on different texts."""

from __future__ import annotations

from pathlib import Path

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, calibrations_argument
from rq_compile.cli.screen import Screen, on_screen


@click.command("merge")
@calibrations_argument
@click.option("-o", "--output", type=FILE, required=True, help="The calibration to write (.json).")
@on_screen
def command(screen: Screen, calibrations: dict[Path, float | None], output: Path) -> None:
    """Add up calibrations of one model on different texts.

    real.json:3 rare.json:1 counts the texts of real.json as three quarters of all tokens, however long they are. Without
    weights, every token counts once.
    """
    from rq_compile.cli.tables import calibration_tables

    written = rq.merge(calibrations, output)
    screen.note(f"wrote {output}" + (f" and {written.statistics.name}" if written.statistics else ""))
    screen.result(written, *calibration_tables(written), asked_for=False)
