"""``rq-compile calibrate``: run the model over text and measure its experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

import rq_compile as rq
from rq_compile.cli.options import (
    BLOCKS,
    FILE,
    QUANTIZERS,
    SIZE,
    FormatList,
    batch_size_option,
    dry_run_option,
    given_options,
    sequence_length_option,
    text_option,
    tokens_option,
)
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError
from rq_compile.outputs import check_calibration

if TYPE_CHECKING:
    from rq_compile.quantization.formats import Block, Format, Quantizer

# The options that control how the model is run and measured.
MEASURING = (
    "texts",
    "field",
    "samples",
    "seed",
    "tokens",
    "batch_size",
    "sequence_length",
    "wanda_fraction",
    "quantizer",
    "block",
    "formats",
    "memory_limit",
    "device",
    "data_free",
    "fresh",
    "dry_run",
)


@click.command("calibrate")
@click.argument("folder", metavar="MODEL", type=FILE)
@text_option
@click.option("--field", help="For .jsonl and .parquet files: the field to read from every row. Default: text, else messages.")
@click.option(
    "--samples", type=click.IntRange(1), help="For .jsonl and .parquet files: rows to run, chosen at random. Default: all."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="With --samples: seed of the random choice.")
@click.option("-o", "--output", type=FILE, required=True, help="The calibration to write (.json).")
@tokens_option
@batch_size_option
@sequence_length_option
@click.option(
    "--wanda-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="The paper's s: an expert's score is the mean over this fraction of its weights, lowest first.",
)
@click.option(
    "--quantizer",
    type=click.Choice(QUANTIZERS),
    default="gptq",
    show_default=True,
    help="How weights are rounded: by GPTQ, with statistics of their inputs, or each to the nearest.",
)
@click.option(
    "--block",
    type=click.Choice(BLOCKS),
    default="auto",
    show_default=True,
    help="Number of quantized weights that share a scale. Fewer reduce the error and take more bytes. auto: as in a quantized "
    "checkpoint, otherwise 128.",
)
@click.option(
    "--formats",
    type=FormatList(),
    default="int8,int4",
    show_default=True,
    help="Formats to measure experts in: int8, int4, int3, int2, constant (the mean output replaces the expert). Plans use what "
    "was measured.",
)
@click.option(
    "--memory-limit",
    type=SIZE,
    help="Memory to stay below; a model that needs more runs layer by layer. Default: the available memory.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="The device that runs the model; measurements run on the CPU.",
)
@click.option("--from-loads", type=FILE, multiple=True, help="Loads that SGLang or TensorRT-LLM recorded; repeatable.")
@click.option("--calibration", "earlier", type=FILE, help="With --from-loads: the calibration to put these loads into.")
@click.option("--data-free", is_flag=True, help="Use no text: assume uniform loads, and take errors from the weights alone.")
@click.option("--fresh", is_flag=True, help="Start over instead of continuing an interrupted calibration.")
@dry_run_option
@on_screen
def command(
    screen: Screen,
    folder: Path,
    texts: tuple[Path, ...],
    field: str | None,
    samples: int | None,
    seed: int,
    output: Path,
    dry_run: bool,
    tokens: int,
    batch_size: int | None,
    sequence_length: int | None,
    quantizer: Quantizer,
    block: str,
    formats: tuple[Format, ...],
    wanda_fraction: float,
    memory_limit: int | None,
    device: str,
    from_loads: tuple[Path, ...],
    earlier: Path | None,
    data_free: bool,
    fresh: bool,
) -> None:
    """Measure each expert's load, importance and errors on text.

    With --from-loads, MODEL is not run: the loads of an earlier calibration are replaced by those that a server recorded.
    """
    check_calibration(
        output,
        [*texts, *from_loads, *([earlier] if earlier else [])],
        statistics=(quantizer == "gptq" or "constant" in formats) and not (from_loads or data_free),
    )
    if from_loads or earlier:
        from_recorded_loads(screen, folder, output, from_loads, earlier)
        return
    if data_free:
        without_text(
            screen,
            folder,
            output,
            block=None if block == "auto" else cast("Block", int(block)),
            formats=formats,
            fraction=wanda_fraction,
        )
        return
    from rq_compile.texts import chat_template, has_rows, open_texts

    check_rows([path for path in texts if not has_rows(path)])
    contents = open_texts(texts, field=field, samples=samples, seed=seed, render=chat_template(folder))

    from rq_compile.calibration.scratch import return_large_arrays_when_freed
    from rq_compile.cli.tables import calibration_tables

    return_large_arrays_when_freed()  # before torch first allocates, which opening a model does
    model = rq.open(folder)
    if dry_run:
        from rq_compile.calibration.run_estimate import calibration_estimate
        from rq_compile.cli.tables import estimate_tables

        estimate = calibration_estimate(
            model,
            contents,
            output,
            tokens=tokens,
            batch_size=batch_size,
            sequence_length=sequence_length,
            quantizer=quantizer,
            formats=formats,
            memory_limit=memory_limit,
            device=device,
        )
        screen.result(estimate, *estimate_tables(estimate))
        return
    under_way = [""]
    with screen.progress("calibrating", "tokens") as progress:
        calibration = rq.calibrate(
            model,
            contents,
            output,
            tokens=tokens,
            batch_size=batch_size,
            sequence_length=sequence_length,
            quantizer=quantizer,
            block=None if block == "auto" else cast("Block", int(block)),
            formats=formats,
            wanda_fraction=wanda_fraction,
            memory_limit=memory_limit,
            device=device,
            fresh=fresh,
            progress=lambda done, total: progress(done, total, under_way[0]),
            detail=lambda text: under_way.__setitem__(0, text),
        )
    screen.note(f"wrote {output}" + (f" and {calibration.statistics.name}" if calibration.statistics else ""))
    screen.result(calibration, *calibration_tables(calibration), asked_for=False)


def check_rows(plain: list[Path]) -> None:
    """
    Args:
        plain: the text files without rows.

    Raises:
        UserError: an option for rows was given, but there are files without rows.
    """
    for name, option in given_options().items():
        if name in ("field", "samples", "seed") and plain:
            raise UserError(
                f"{option} is for the rows of .jsonl and .parquet files, but --text {plain[0]} has no rows; leave it out", 2
            )


def without_text(
    screen: Screen, folder: Path, output: Path, *, block: Block | None, formats: tuple[Format, ...], fraction: float
) -> None:
    """
    Raises:
        UserError: an option has no effect, or a weight is not finite.
    """
    for name, option in given_options().items():
        if name in MEASURING and name not in ("block", "formats", "wanda_fraction", "data_free"):
            raise UserError(f"{option} has no effect with --data-free, which uses no text; leave one of the two out", 2)

    from rq_compile.calibration.data_free import check_formats, data_free
    from rq_compile.cli.tables import calibration_tables
    from rq_compile.files import write_document

    check_formats(formats)
    model = rq.open(folder)
    with screen.progress("measuring weights", "experts") as progress:
        calibration = data_free(model, progress=progress, block=block, formats=formats, wanda_fraction=fraction)
    write_document(calibration, output)
    screen.note(f"wrote {output}")
    screen.result(calibration, *calibration_tables(calibration), asked_for=False)


def from_recorded_loads(screen: Screen, folder: Path, output: Path, paths: tuple[Path, ...], earlier: Path | None) -> None:
    """
    Raises:
        UserError: an option is missing or has no effect, or the calibration is of another model.
    """
    if not (paths and earlier):
        raise UserError(
            "--from-loads gives loads, but no errors of formats; also give --calibration FILE, an earlier calibration of MODEL", 2
        )
    for name, option in given_options().items():
        if name in MEASURING:
            raise UserError(f"{option} has no effect with --from-loads, which does not run MODEL; leave one of the two out", 2)

    from rq_compile.calibration.recorded_loads import with_recorded_loads
    from rq_compile.calibration.schema import Calibration
    from rq_compile.cli.tables import calibration_tables
    from rq_compile.files import read_document, write_document

    calibration = read_document(Calibration, earlier)
    model = rq.open(folder)
    if calibration.fingerprint != model.fingerprint:
        raise UserError(f"{earlier} is of {calibration.model}, not of {folder}; give a calibration of this MODEL", 2)
    made = with_recorded_loads(calibration, list(paths))
    if made.statistics:
        made = made.model_copy(update={"statistics": made.statistics.named_from(earlier.parent, output)})
    write_document(made, output)
    screen.note(f"wrote {output}")
    screen.result(made, *calibration_tables(made), asked_for=False)
