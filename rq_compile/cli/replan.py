"""``rq-compile replan``: balance new loads with as few changes to a plan as possible."""

from __future__ import annotations

from pathlib import Path

import click

from rq_compile.cli.options import FILE
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.outputs import check_outputs, document


@click.command("replan")
@click.argument("plan", type=FILE)
@click.option("--loads", type=FILE, required=True, help="A calibration of the plan's model on newer text.")
@click.option("-o", "--output", type=FILE, required=True, help="The plan to write (.json).")
@click.option("--tolerance", type=click.FloatRange(0), default=0.05, show_default=True, help="Imbalance to accept.")
@on_screen
def command(screen: Screen, plan: Path, loads: Path, output: Path, tolerance: float) -> None:
    """Adapt PLAN to new loads and move as little as possible."""
    check_outputs({output: document("plan")}, [plan, loads])

    from rq_compile.calibration.schema import Calibration
    from rq_compile.cli.tables import changes_tables
    from rq_compile.files import read_document, sha256, write_document
    from rq_compile.planning.replan import replan
    from rq_compile.planning.schema import Plan

    old, calibration = read_document(Plan, plan), read_document(Calibration, loads)
    new, changes = replan(old, calibration, tolerance=tolerance, calibration_sha256=sha256(loads))
    if new.statistics:
        new = new.model_copy(update={"statistics": new.statistics.named_from(plan.parent, output)})
    write_document(new, output)
    screen.note(f"wrote {output}")
    screen.result(changes, *changes_tables(changes, new))
