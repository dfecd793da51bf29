"""``rq-compile merge``: make one calibration from several calibrations on different texts."""

from __future__ import annotations

from pathlib import Path

import click

from rq_compile.cli.options import FILE
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError
from rq_compile.outputs import check_calibration


@click.command("merge")
@click.argument("calibrations", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="The calibration to write (.json).")
@on_screen
def command(screen: Screen, calibrations: tuple[Path, ...], output: Path) -> None:
    """Add up calibrations of one model on different texts."""
    check_calibration(output, list(calibrations), statistics=True)
    different = len({path.resolve() for path in calibrations})
    if different < max(2, len(calibrations)):
        raise UserError(
            f"merge needs at least two different calibrations, but {len(calibrations)} paths name {different}; give each once", 2
        )

    from rq_compile import spill
    from rq_compile.calibration.merge import merge, merge_statistics
    from rq_compile.calibration.schema import Calibration
    from rq_compile.calibration.statistics import Statistics, write_with_statistics
    from rq_compile.cli.tables import calibration_tables
    from rq_compile.files import read_document

    read = {path: read_document(Calibration, path) for path in calibrations}
    merged = merge(read)
    statistics = [Statistics.beside(path.parent, one.statistics) for path, one in read.items() if one.statistics]
    with spill.beside(output):
        tensors = merge_statistics(merged.layers, statistics) if statistics else {}
    written = write_with_statistics(merged, tensors, output)
    screen.note(f"wrote {output}" + (f" and {written.statistics.name}" if written.statistics else ""))
    screen.result(written, *calibration_tables(written), asked_for=False)
