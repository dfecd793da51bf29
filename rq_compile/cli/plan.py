"""``rq-compile plan``: turn a calibration into slots, formats and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, SIZE, calibrations_argument, parse_options, planning_options
from rq_compile.cli.screen import Progress, Screen, on_screen
from rq_compile.errors import UserError
from rq_compile.outputs import check_calibration, check_outputs, document
from rq_compile.planning.targets import TARGETS

if TYPE_CHECKING:
    from rq_compile.architectures.model import Model
    from rq_compile.planning.schema import Plan
    from rq_compile.planning.sweep import Sweep


@click.command("plan")
@calibrations_argument
@click.option("-o", "--output", type=FILE, required=True, help="The plan, or the sweep, to write (.json).")
@click.option("--target", type=click.Choice(list(TARGETS)), default="cpu", show_default=True, help="What the engine is for.")
@click.option("--data-free", is_flag=True, help="Plan without text: give MODEL instead of CALIBRATION.")
@click.option("--sweep", is_flag=True, help="Plan for many budgets and write the cost of each, instead of one plan.")
@click.option(
    "--budgets",
    metavar="LIST",
    help="With --sweep: the values of --memory (0.3,0.5,1) or of --engine-bytes (12G,18G) to plan for. Default: twelve, from the "
    "least possible to --engine-bytes or, without it, to --memory 1.25.",
)
@planning_options
@on_screen
def command(
    screen: Screen,
    calibrations: dict[Path, float | None],
    output: Path,
    target: str,
    engine_bytes: int | None,
    objective: str | None,
    data_free: bool,
    sweep: bool,
    budgets: str | None,
    policy: str,
    memory: float | None,
    ranks: int,
    mixed_copies: bool,
    policy_options: tuple[str, ...],
) -> None:
    """Decide how often and in which format each expert is stored.

    Several calibrations of one model are merged first: real.json:3 rare.json:1 counts the texts of real.json as three quarters of
    all tokens. The merged calibration is written beside the plan, as OUTPUT.calibration.json.

    With --data-free, give a checkpoint directory instead of CALIBRATION: errors come from the weights alone, and loads are
    assumed to be uniform.
    """
    calibration = check_sources(calibrations, output, data_free=data_free)
    check_outputs({output: document("sweep" if sweep else "plan")}, calibrations)
    asked = parse_budgets(budgets, sweep=sweep, memory=memory, engine_bytes=engine_bytes)
    options = parse_options(policy_options, policy=policy, mixed_copies=mixed_copies, objective=objective)

    from rq_compile.cli.tables import plan_tables, sweep_tables
    from rq_compile.files import files_written_beside
    from rq_compile.planning.plan import check_arguments
    from rq_compile.planning.schema import Plan

    how: dict[str, Any] = {"policy": policy, "ranks": ranks, "target": target}
    largest = max(asked.get("engine_budgets", ()), default=engine_bytes)
    check_arguments(**how, memory=memory, options=options, engine_bytes=largest)

    def write(source: Model | Path, path: Path) -> Plan | Sweep:
        if sweep:
            return written_sweep(screen, source, path, **asked, engine_bytes=engine_bytes, **how, **options)
        with measuring(screen, source) as progress:
            return rq.plan(source, path, **how, memory=memory, engine_bytes=engine_bytes, progress=progress, **options)

    if len(calibrations) > 1:
        check_calibration(calibration, calibrations, statistics=True)
        with files_written_beside(output) as folder:
            rq.merge(calibrations, folder / calibration.name)
            made = write(folder / calibration.name, folder / output.name)
        screen.note(f"wrote {calibration}")
    else:
        made = write(rq.open(calibration) if data_free else calibration, output)
    screen.note(f"wrote {output}")
    screen.result(made, *(plan_tables(made) if isinstance(made, Plan) else sweep_tables(made)), asked_for=False)


def parse_budgets(budgets: str | None, *, sweep: bool, memory: float | None, engine_bytes: int | None) -> dict[str, list[Any]]:
    """``budgets`` or ``engine_budgets`` of ``make_sweep``.

    Raises:
        UserError: they are neither numbers nor sizes, one is out of range, or an option without effect was given.
    """
    if sweep and memory is not None:
        raise UserError(f"--memory {memory:g} has no effect with --sweep; give the budgets with --budgets", 2)
    if budgets is None:
        return {}
    if not sweep:
        raise UserError(f"--budgets {budgets} has no effect without --sweep; add --sweep, or give one with --memory", 2)
    if engine_bytes is not None:
        raise UserError(f"--budgets {budgets} and --engine-bytes {engine_bytes} are two ranges; leave one of them out", 2)
    written = [budget.strip() for budget in budgets.split(",")]
    try:
        if written[0][-1:].isalpha() and written[0].lower() not in ("nan", "inf"):
            return {"engine_budgets": [SIZE.convert(size if size[-1:].isalpha() else "", None, None) for size in written]}
        numbers = [float(number) for number in written]
    except (ValueError, click.BadParameter):
        raise UserError(
            f"--budgets {budgets} is not a list of numbers or of sizes; write for example --budgets 0.3,0.5,1 or 12G,18G", 2
        ) from None
    from rq_compile.bounds import MOST_MEMORY

    if wrong := [number for number in numbers if not 0 < number <= MOST_MEMORY]:
        raise UserError(
            f"--budgets {budgets} has {wrong[0]:g}; give numbers above 0 and up to {MOST_MEMORY:g}, or sizes with a unit (18G)", 2
        )
    return {"budgets": numbers}


def check_sources(sources: Mapping[Path, float | None], output: Path, *, data_free: bool) -> Path:
    """The one source of the plan, or the calibration that several are merged into.

    Raises:
        UserError: see ``check_source``; a weight has nothing to weigh against, or a checkpoint is one of several sources.
    """
    first, *others = sources
    if not others and (weight := sources[first]) is not None:
        raise UserError(f"the weight of {first}:{weight:g} has no effect on a single calibration; leave it out", 2)
    if others and data_free:
        raise UserError(f"--data-free plans from one checkpoint, but {len(sources)} paths are given; give one", 2)
    for path in sources:
        check_source(path, data_free=data_free)
    return output.with_suffix(".calibration.json") if others else first


def check_source(source: Path, *, data_free: bool) -> None:
    """
    Raises:
        UserError: ``source`` is a checkpoint without ``data_free``, or is not a checkpoint with it.
    """
    if source.is_dir() and not data_free:
        raise UserError(
            f"{source} is a directory, but a plan is made from a calibration; run rq-compile calibrate on it first, or give "
            "--data-free to plan from its weights alone",
            2,
        )
    if data_free and not source.is_dir():
        raise UserError(f"--data-free reads a checkpoint, but {source} is not a directory; give MODEL, or leave it out", 2)


def written_sweep(screen: Screen, source: Model | Path, output: Path, **arguments: Any) -> Sweep:
    """``arguments``: the other ones of ``make_sweep``."""
    from rq_compile.calibration.data_free import data_free
    from rq_compile.calibration.schema import Calibration
    from rq_compile.files import read_document, sha256, write_document
    from rq_compile.planning.sweep import make_sweep

    if isinstance(source, Path):
        calibration, digest = read_document(Calibration, source), sha256(source)
    else:
        with measuring(screen, source) as progress:
            calibration, digest = data_free(source, progress=progress), None
    with screen.progress("planning", "budgets") as progress:
        swept = make_sweep(calibration, calibration_sha256=digest, progress=progress, **arguments)
    write_document(swept, output)
    return swept


@contextmanager
def measuring(screen: Screen, source: Model | Path) -> Iterator[Progress]:
    """Progress of measuring the weights of a model; a calibration has measured them."""
    if isinstance(source, Path):
        yield lambda done, total, detail="": None
    else:
        with screen.progress("measuring weights", "experts") as progress:
            yield progress
