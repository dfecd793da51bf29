"""``rq-compile inspect``: a checkpoint, calibration, plan, sweep or engine as tables."""

from __future__ import annotations

from pathlib import Path

import click

from rq_compile.cli.options import FILE
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.cli.tensorrt import inspect_plan
from rq_compile.engine.paths import engine_of, manifest_path
from rq_compile.errors import UserError
from rq_compile.outputs import document_kind


@click.command("inspect")
@click.argument("file", type=FILE)
@click.option("--verify", is_flag=True, help="Recompute the SHA-256 of an engine's files.")
@on_screen
def command(screen: Screen, file: Path, verify: bool) -> None:
    """Show a checkpoint, calibration, plan, sweep or engine."""
    if file.is_dir() and not manifest_path(file).is_file():
        inspect_checkpoint(screen, file, verify=verify)
        return
    kind = "engine" if file.suffix in (".onnx", ".plan") or manifest_path(file).is_file() else kind_of(file)
    if verify and kind != "engine":
        raise UserError(f"--verify checks an engine's files, but {file} is a {kind}; leave --verify out", 2)

    if file.suffix == ".plan":
        inspect_plan(screen, file, verify=verify)
        return

    from rq_compile.calibration.schema import Calibration
    from rq_compile.cli import tables
    from rq_compile.files import read_document
    from rq_compile.planning.schema import Plan
    from rq_compile.planning.sweep import Sweep
    from rq_compile.runtime import files

    if kind == "calibration":
        calibration = read_document(Calibration, file)
        screen.result(calibration, *tables.calibration_tables(calibration))
    elif kind == "plan":
        plan = read_document(Plan, file)
        screen.result(plan, *tables.plan_tables(plan))
    elif kind == "sweep":
        sweep = read_document(Sweep, file)
        screen.result(sweep, *tables.sweep_tables(sweep))
    else:
        engine = engine_of(file)
        manifest = files.read_manifest(engine)
        if verify:
            files.verify(engine, manifest)
            screen.note(f"{engine}: every file is intact")
        screen.result(manifest, *tables.engine_tables(manifest))


def inspect_checkpoint(screen: Screen, folder: Path, *, verify: bool) -> None:
    """
    Raises:
        UserError: the folder does not hold a checkpoint that can be described.
    """
    if verify:
        raise UserError(f"--verify checks an engine's files, but {folder} is a checkpoint; leave --verify out", 2)

    from rq_compile.checkpoint.checkpoint import Checkpoint
    from rq_compile.cli.tables import checkpoint_tables
    from rq_compile.inspection import inspected

    found = inspected(Checkpoint.open(folder))
    screen.result(found, *checkpoint_tables(found))


def kind_of(file: Path) -> str:
    """
    Raises:
        UserError: the file cannot be read, or rq-compile did not write it.
    """
    try:
        kind = document_kind(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check the path", 2) from error
    if kind is None:
        from rq_compile.checkpoint.other_folders import refuse_weights_file

        refuse_weights_file(file)
        raise UserError(
            f"{file} is not a file of rq-compile; inspect a checkpoint folder, a calibration, a plan, a sweep "
            "or an engine (.onnx, .plan)",
            2,
        )
    return kind
