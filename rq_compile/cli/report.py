"""``rq-compile report``: describe an engine on an HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from rq_compile.cli.options import FILE
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.outputs import REPORT, check_outputs


@click.command("report")
@click.argument("engine", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The page to write (.html).")
@click.option("--evaluation", type=FILE, help="The output of `rq-compile evaluate ENGINE ... --json`.")
@click.option("--bench", type=FILE, help="The output of `rq-compile bench ENGINE ... --json`.")
@click.option(
    "--calibration", type=FILE, help="The calibration that the plan was made from. Adds whether texts agree on the busy experts."
)
@click.option("--sweep", type=FILE, help="The output of `rq-compile plan CALIBRATION --sweep` for the same model.")
@on_screen
def command(
    screen: Screen,
    engine: Path,
    output: Path,
    evaluation: Path | None,
    bench: Path | None,
    calibration: Path | None,
    sweep: Path | None,
) -> None:
    """Describe ENGINE on one self-contained HTML page.

    Load, balance, formats and memory come from the engine. Accuracy and speed come from the output of evaluate and bench. The
    trade-off between bytes, error and time comes from a sweep.
    """
    from rq_compile.calibration.schema import Calibration
    from rq_compile.cli.tables import facts
    from rq_compile.engine.paths import manifest_path
    from rq_compile.evaluation.schema import Bench, Evaluation
    from rq_compile.files import read_document, written_beside
    from rq_compile.planning.sweep import Sweep
    from rq_compile.reporting.headline import headline
    from rq_compile.reporting.page import page
    from rq_compile.reporting.same_engine import check_bench, check_calibration, check_evaluation, check_sweep
    from rq_compile.runtime.files import read_manifest

    manifest = read_manifest(engine)
    parts = (manifest_path(engine).parent / file.name for file in manifest.files)
    read = [manifest_path(engine), *parts, *(path for path in (evaluation, bench, calibration, sweep) if path)]
    check_outputs({output: REPORT}, read)
    evaluated = timed = swept = calibrated = None
    if evaluation is not None:
        evaluated = read_document(Evaluation, evaluation)
        check_evaluation(engine, manifest, evaluated, evaluation)
    if bench is not None:
        timed = read_document(Bench, bench)
        check_bench(engine, manifest, timed, bench)
    if sweep is not None:
        swept = read_document(Sweep, sweep)
        check_sweep(engine, manifest, swept, sweep)
    if calibration is not None:
        calibrated = read_document(Calibration, calibration)
        check_calibration(engine, manifest, calibration)
    with written_beside(output) as temporary:
        temporary.write_text(page(engine.name, manifest, evaluated, timed, swept, calibrated), encoding="utf-8")
    screen.note(f"wrote {output}")
    result = headline(engine.name, manifest, evaluated, timed)
    screen.result(result, facts(result.engine, result=result.sentence), asked_for=False)
