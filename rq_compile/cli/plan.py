"""``rq-compile plan``: from a calibration to slots, formats and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rq_compile.cli.opened import opened
from rq_compile.cli.options import FILE, parse_options, planning_options
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError
from rq_compile.outputs import check_outputs, document
from rq_compile.planning.targets import TARGETS

if TYPE_CHECKING:
    from rq_compile.calibration.schema import Calibration


@click.command("plan")
@click.argument("calibration", metavar="CALIBRATION", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The plan to write (.json).")
@click.option("--target", type=click.Choice(list(TARGETS)), default="cpu", show_default=True, help="What the engine is for.")
@click.option("--data-free", is_flag=True, help="Run no text: give MODEL in the place of CALIBRATION.")
@planning_options
@on_screen
def command(
    screen: Screen,
    calibration: Path,
    output: Path,
    target: str,
    data_free: bool,
    policy: str,
    memory: float | None,
    ranks: int,
    mixed_copies: bool,
    policy_options: tuple[str, ...],
) -> None:
    """Decide how often and in which format each expert is stored.

    With --data-free a checkpoint directory stands in the place of CALIBRATION: weights alone tell the errors, and loads are
    taken to be uniform.
    """
    check_source(calibration, data_free=data_free)
    check_outputs({output: document("plan")}, [calibration])
    options = parse_options(policy_options, policy=policy, mixed_copies=mixed_copies)

    from rq_compile.calibration.schema import Calibration
    from rq_compile.cli.tables import plan_tables
    from rq_compile.files import read_document, sha256, write_document
    from rq_compile.planning.plan import check_arguments, make_plan

    check_arguments(policy=policy, memory=memory, ranks=ranks, target=target, options=options)
    if data_free:
        measured, digest = without_text(screen, calibration), None
    else:
        measured, digest = read_document(Calibration, calibration), sha256(calibration)
    plan = make_plan(measured, policy=policy, memory=memory, ranks=ranks, target=target, calibration_sha256=digest, **options)
    if plan.statistics:
        plan = plan.model_copy(update={"statistics": plan.statistics.named_from(calibration.parent, output)})
    write_document(plan, output)
    screen.note(f"wrote {output}")
    screen.result(plan, *plan_tables(plan), asked_for=False)


def check_source(source: Path, *, data_free: bool) -> None:
    """
    Raises:
        UserError: ``source`` is a checkpoint, which is planned without text alone, or no checkpoint where one is asked for.
    """
    if source.is_dir() and not data_free:
        raise UserError(
            f"{source} is a directory, and a plan is made from a calibration; run rq-compile calibrate on it first, or give "
            "--data-free to plan by its weights alone",
            2,
        )
    if data_free and not source.is_dir():
        raise UserError(f"--data-free reads a checkpoint, but {source} is not a directory; give MODEL, or leave it out", 2)


def without_text(screen: Screen, folder: Path) -> Calibration:
    from rq_compile.calibration.data_free import data_free

    model = opened(screen, folder)
    with screen.progress("measuring weights", "experts") as progress:
        return data_free(model, progress=progress)
