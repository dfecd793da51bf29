"""``rq-compile calibrate``: run the model over text and write what its experts did."""

from __future__ import annotations

from pathlib import Path

import click

from rq_compile.cli.options import FILE, batch_size_option, check_writable, read_texts, sequence_length_option, text_option
from rq_compile.cli.screen import Screen, on_screen


@click.command("calibrate")
@click.argument("model", type=FILE)
@text_option
@click.option("-o", "--output", type=FILE, required=True, help="The calibration to write (.json).")
@batch_size_option
@sequence_length_option
@on_screen
def command(screen: Screen, model: Path, texts: tuple[Path, ...], output: Path, batch_size: int, sequence_length: int) -> None:
    """Run MODEL over text: each expert's load, importance and errors."""
    check_writable(output)
    contents = read_texts(texts)

    from rq_compile.calibration.calibrate import calibrate
    from rq_compile.checkpoint.checkpoint import Checkpoint
    from rq_compile.cli.tables import calibration_tables
    from rq_compile.files import write_document, written_beside

    checkpoint = Checkpoint.open(model)
    with screen.progress("calibrating", "tokens") as progress:
        calibration, statistics = calibrate(
            checkpoint, contents, batch_size=batch_size, sequence_length=sequence_length, progress=progress
        )
    from safetensors.numpy import save

    statistics_path = output.with_suffix(".safetensors")
    with written_beside(statistics_path) as temporary:
        temporary.write_bytes(save(statistics))  # save_file would hide a full disk in an exception of its own
    calibration = calibration.model_copy(update={"statistics": statistics_path.name})
    write_document(calibration, output)
    screen.note(f"wrote {output} and {statistics_path}")
    screen.result(calibration, *calibration_tables(calibration), asked_for=False)
