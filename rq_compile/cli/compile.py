"""``rq-compile MODEL -o OUT``: compile. Without a plan, the command calibrates and plans first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

import rq_compile as rq
from rq_compile.cli.options import (
    DENSE_FORMATS,
    FILE,
    batch_size_option,
    dry_run_option,
    given_options,
    parse_options,
    planning_options,
    sequence_length_option,
    text_option,
    tokens_option,
)
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.cli.tensorrt import (
    BATCH,
    OPTIONS,
    SEQUENCE,
    check_tensorrt_options,
    checked_settings,
    compile_plan,
    tensorrt_options,
)
from rq_compile.errors import UserError
from rq_compile.lowerings import LOWERINGS, lowering_for, with_options
from rq_compile.outputs import check_outputs
from rq_compile.processes import world_size
from rq_compile.targets.engine_outputs import check_engine_path, onnx_outputs, tensorrt_outputs

if TYPE_CHECKING:
    from rq_compile.architectures.model import Model
    from rq_compile.engine.manifest import LoweringName
    from rq_compile.lowerings import Lowering
    from rq_compile.quantization.formats import DenseFormat

MEGABYTE = 10**6
EXTENSIONS = (".onnx", ".plan")
log = logging.getLogger(__name__)  # shows a remark once, whichever stages make it
PLANNING = (
    *("policy", "memory", "engine_bytes", "objective", "ranks", "mixed_copies", "policy_options"),
    *("texts", "tokens", "batch_size", "sequence_length"),
)


@click.command("compile")
@click.argument("folder", metavar="MODEL", type=FILE)
@click.option("--plan", "plan_path", type=FILE, help="The plan to follow; without it, --text is needed.")
@text_option
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    help="The engine to write: .onnx, .plan for TensorRT, or a folder for a plan with ranks.",
)
@click.option(
    "--lowering",
    type=click.Choice(list(LOWERINGS)),
    default="native",
    show_default=True,
    help="; ".join(f"{name} {kind.summary}" for name, kind in LOWERINGS.items()) + ".",
)
@click.option(
    "--activation-bits",
    type=click.Choice(["8", "32"]),
    default="32",
    show_default=True,
    help="Activations that native and stock multiply by quantized weights: kept in fp32, or rounded to int8, which is faster. "
    "With 8, native also rounds those of bf16 weights to bf16.",
)
@click.option(
    "--dense-format",
    type=click.Choice(DENSE_FORMATS),
    default="stored",
    show_default=True,
    help="Format of non-expert weights (native only): 16 bits as stored, rounded to int8, to int4 (but the head to int8), "
    "or widened to fp32.",
)
@click.option(
    "--link-weights",
    is_flag=True,
    help="Hard-link the checkpoint and use its weights in place where the layout allows (mostly embeddings).",
)
@click.option("--fresh", is_flag=True, help="Start over instead of continuing an interrupted compilation.")
@click.option("--threads", type=click.IntRange(1), help="Threads that compute the weights; default: one per core.")
@tensorrt_options
@planning_options
@tokens_option
@batch_size_option
@sequence_length_option
@dry_run_option
@on_screen
def command(
    screen: Screen,
    folder: Path,
    plan_path: Path | None,
    texts: tuple[Path, ...],
    output: Path,
    lowering: str,
    activation_bits: str,
    dense_format: DenseFormat,
    link_weights: bool,
    fresh: bool,
    threads: int | None,
    tokens: int,
    batch_size: int | None,
    sequence_length: int | None,
    mixed_copies: bool,
    objective: str | None,
    policy_options: tuple[str, ...],
    dry_run: bool,
    **planning: Any,
) -> None:
    """Compile MODEL into an engine (the default command)."""
    kind, ranks = engine_kind(output, lowering, plan_path, planning["ranks"])
    check_extension(output, kind, ranks)
    check_tensorrt_options(output)
    check_processes(output)
    tensorrt = {name: planning.pop(name) for name in OPTIONS}
    realised = lowering_by(kind, activation_bits, dense_format, f"--lowering {kind.name}")
    inputs = [path for path in (plan_path, tensorrt["plugins"], *texts) if path]
    shape: dict[str, Any] = {"link_weights": link_weights, "threads": threads}
    if output.suffix == ".plan":
        written = tensorrt_outputs(output)
    else:
        written = onnx_outputs(output, folder, link_weights=link_weights, ranks=ranks if kind.of_ranks else 0)
    check_outputs(written, inputs)
    if plan_path is not None:
        refuse_planning_options()
    elif not texts:
        raise UserError("compiling needs a plan; give --plan FILE, or --text FILE to calibrate and plan first", 2)
    from rq_compile.texts import chat_template, open_texts

    contents = open_texts(texts, render=chat_template(folder)) if plan_path is None else {}
    options = parse_options(policy_options, policy=planning["policy"], mixed_copies=mixed_copies, objective=objective)

    from rq_compile import spill
    from rq_compile.architectures.without_engine import check_engine
    from rq_compile.calibration.statistics import Statistics
    from rq_compile.files import read_document
    from rq_compile.planning.schema import Plan
    from rq_compile.targets.preflight import check_dense_format, check_same_model, preflight, remarks_before

    model = rq.open(folder)
    check_engine(model)
    settings = None
    if output.suffix == ".plan":
        settings = checked_settings(tensorrt, model, (batch_size or BATCH, sequence_length or SEQUENCE))
    if plan_path is not None:
        plan = read_document(Plan, plan_path)
        check_same_model(plan, model, plan_path)
        check_dense_format(plan, dense_format if "dense_format" in given_options() else None)
        if settings is None and not kind.of_ranks and "lowering" not in given_options():
            kind = lowering_for(plan.target)
            chosen_by = f"--lowering {kind.name}, which {plan_path} for {plan.target} chooses"
            realised = lowering_by(kind, activation_bits, dense_format, chosen_by)
        if dry_run:
            for remark in remarks_before(model, plan, realised):
                log.info(remark)
            preflight(model, plan, realised)
            show_estimate(screen, model, output, realised, plan=plan, **shape)
            return
        statistics = Statistics.beside(plan_path.parent, plan.statistics) if plan.statistics else None
    else:
        from rq_compile.calibration.calibrate import calibrate
        from rq_compile.planning.plan import check_arguments, make_plan
        from rq_compile.processes import world

        planning["target"] = (settings.lowering if settings else realised).planned_for
        check_arguments(**planning, options=options)
        if planning["engine_bytes"] is not None and "dense_format" in given_options():
            raise UserError(
                f"--dense-format {dense_format} and --engine-bytes {planning['engine_bytes']} both choose the formats of "
                "non-expert weights; leave one of the two out",
                2,
            )
        if dry_run:
            first = {"texts": contents, "tokens": tokens, "batch_size": batch_size, "sequence_length": sequence_length}
            budget = {name: planning[name] for name in ("memory", "engine_bytes")}
            show_estimate(screen, model, output, realised, first, plan=None, **budget, **shape)
            return
        with spill.beside(output), screen.progress("calibrating", "tokens") as progress:
            calibration, tensors = calibrate(
                model,
                contents,
                tokens=tokens,
                batch_size=batch_size,
                sequence_length=sequence_length,
                progress=progress,
                remark=log.info,
            )
        plan = world().from_first(make_plan(calibration, **planning, **options))
        statistics = Statistics.of(tensors)

    if settings is not None:
        from rq_compile.targets.tensorrt.compile import remarks_before as remarks_before_build

        for remark in remarks_before_build(model, plan, settings):
            log.info(remark)
        compile_plan(screen, model, plan, output, settings, statistics=statistics, threads=threads)
        return

    from rq_compile.cli.tables import engine_tables

    with screen.progress("compiling", "MB") as progress:
        manifest = rq.compile(
            model,
            plan,
            output,
            statistics=statistics,
            lowering=cast("LoweringName", realised.name),
            **{option: getattr(realised, option) for option in realised.options if option != "dense_format" or not plan.dense},
            link_weights=link_weights,
            threads=threads,
            fresh=fresh,
            progress=lambda done, total: progress(done // MEGABYTE, total // MEGABYTE),
        )
    if manifest.ranks:
        screen.note(
            f"wrote {output} for {len(manifest.ranks)} ranks: mpirun -n {len(manifest.ranks)} rq-compile generate {output}"
        )
    else:
        screen.note(f"wrote {output}, {manifest.weights.name} and {output.with_suffix('.json').name}")
    tables = engine_tables(manifest)
    # With --plan the user has already seen the plan.
    screen.result(manifest, *(tables if plan_path is None else tables[:1]), asked_for=False)


def show_estimate(
    screen: Screen,
    model: Model,
    output: Path,
    lowering: Lowering,
    calibrating: dict[str, Any] | None = None,
    **engine: Any,
) -> None:
    """``calibrating`` and ``engine`` are further arguments of ``calibration_estimate`` and ``engine_estimate``."""
    from rq_compile.calibration.run_estimate import calibration_estimate
    from rq_compile.cli.tables import estimate_tables
    from rq_compile.estimates import together
    from rq_compile.targets.engine_estimate import engine_estimate

    estimate = engine_estimate(model, output, lowering, **engine)
    if calibrating is not None:
        estimate = together(calibration_estimate(model, output=output, **calibrating), estimate)
    screen.result(estimate, *estimate_tables(estimate))


def lowering_by(kind: type[Lowering], activation_bits: str, dense_format: DenseFormat, chosen_by: str) -> Lowering:
    """The lowering with those of the options that it has. ``chosen_by`` says in a message what chose the lowering.

    Raises:
        UserError: an option was given that has no effect on this lowering.
    """
    given = given_options()
    others = "leave one of the two out" if "lowering" in given else "leave it out, or give --lowering native"
    if activation_bits != "32" and "activation_bits" not in kind.options:
        raise UserError(f"--activation-bits {activation_bits} has no effect with {chosen_by}; {others}", 2)
    if "dense_format" in given and "dense_format" not in kind.options:
        raise UserError(f"--dense-format has no effect with {chosen_by}; {others}", 2)
    return with_options(kind, activation_bits=int(activation_bits), dense_format=dense_format)


def engine_kind(output: Path, lowering: str, plan_path: Path | None, ranks: int) -> tuple[type[Lowering], int]:
    """The lowering that the options and the output choose, and how many ranks the plan has or will have.

    A plan with several ranks becomes an engine of as many processes if the output is a folder.

    Raises:
        UserError: the plan is not valid.
    """
    kind = LOWERINGS[lowering]
    if output.suffix in EXTENSIONS and not kind.of_ranks:
        return kind, ranks
    target: str = kind.planned_for
    if plan_path is not None and plan_path.is_file():
        from rq_compile.files import read_document
        from rq_compile.planning.schema import Plan

        plan = read_document(Plan, plan_path)
        target, ranks = plan.target, plan.ranks
    return (kind if "lowering" in given_options() else lowering_for(target, ranks)), ranks


def check_extension(output: Path, kind: type[Lowering], ranks: int) -> None:
    """The output's extension selects the kind of engine.

    Raises:
        UserError: the extension is not .onnx or .plan, or is one and the engine has several processes.
    """
    if kind.of_ranks:
        check_engine_path(output, of_ranks=True, ranks=ranks)
    elif output.suffix not in EXTENSIONS:
        raise UserError(
            f"{output} does not have the extension of an engine; end it in .onnx (ONNX Runtime) or .plan (TensorRT)", 2
        )


def check_processes(output: Path) -> None:
    """
    Raises:
        UserError: several processes would share a compilation that one process must do alone.
    """
    if output.suffix == ".plan" and world_size() > 1:
        raise UserError(
            f"{world_size()} processes cannot share the compilation of {output}, because TensorRT's builder uses one process; "
            "start it without torchrun, or compile an .onnx",
            2,
        )


def refuse_planning_options() -> None:
    """
    Raises:
        UserError: an option was given that the given plan would silently override.
    """
    for name, option in given_options().items():
        if name in PLANNING:
            raise UserError(f"{option} has no effect with --plan; leave one of the two out", 2)
