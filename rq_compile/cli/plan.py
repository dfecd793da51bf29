"""``rq-compile plan``: from a calibration to slots, formats and ranks."""

from __future__ import annotations

from pathlib import Path

import click

from rq_compile.cli.options import FILE, parse_options, planning_options
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.outputs import check_outputs, document
from rq_compile.planning.targets import TARGETS


@click.command("plan")
@click.argument("calibration", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The plan to write (.json).")
@click.option("--target", type=click.Choice(list(TARGETS)), default="cpu", show_default=True, help="What the engine is for.")
@planning_options
@on_screen
def command(
    screen: Screen,
    calibration: Path,
    output: Path,
    target: str,
    policy: str,
    memory: float | None,
    ranks: int,
    mixed_copies: bool,
    policy_options: tuple[str, ...],
) -> None:
    """Decide how often and in which format each expert is stored."""
    check_outputs({output: document("plan")}, [calibration])
    options = parse_options(policy_options, policy=policy, mixed_copies=mixed_copies)

    from rq_compile.calibration.schema import Calibration
    from rq_compile.cli.tables import plan_tables
    from rq_compile.files import read_document, sha256, write_document
    from rq_compile.planning.plan import check_arguments, make_plan

    check_arguments(policy=policy, memory=memory, ranks=ranks, target=target, options=options)
    measured = read_document(Calibration, calibration)
    digest = sha256(calibration)
    plan = make_plan(measured, policy=policy, memory=memory, ranks=ranks, target=target, calibration_sha256=digest, **options)
    if plan.statistics:
        plan = plan.model_copy(update={"statistics": plan.statistics.named_from(calibration.parent, output)})
    write_document(plan, output)
    screen.note(f"wrote {output}")
    screen.result(plan, *plan_tables(plan), asked_for=False)
