"""``-o engine.plan``: the options, the compilation and the tables of TensorRT engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rq_compile.cli.options import FILE, given_options
from rq_compile.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rq_compile.architectures.model import Model
    from rq_compile.calibration.statistics import Statistics
    from rq_compile.cli.screen import Screen
    from rq_compile.planning.schema import Plan
    from rq_compile.targets.tensorrt.compile import Settings
    from rq_compile.targets.tensorrt.manifest import TensorRTManifest
    from rq_compile.targets.tensorrt.profiles import Profile, Range

MEGABYTE = 10**6
# What default profiles are made for where no option says it.
BATCH, SEQUENCE = 8, 256
OPTIONS = ("builder", "plugins", "stock", "sm", "precision", "profiles", "build")
OF_ONNX = ("lowering", "activation_bits", "dense_format", "link_weights", "fresh", "dry_run")


def tensorrt_options(function: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option(
            "--builder",
            type=click.Choice(["tensorrt", "rtx"]),
            default="tensorrt",
            show_default=True,
            help="For .plan: TensorRT, which needs the GPU that it builds for, or TensorRT-RTX, which needs no GPU.",
        ),
        click.option(
            "--plugins",
            type=FILE,
            metavar="LIBRARY",
            help="For .plan by TensorRT: build MoE layers with the plugins of this librq_tensorrt.so and embed it in the engine.",
        ),
        click.option("--stock", is_flag=True, help="For .plan: build MoE layers from standard ops, as without --plugins."),
        click.option("--sm", metavar="80,89,120", help="For .plan by rtx: the compute capabilities to build for."),
        click.option(
            "--precision",
            type=click.Choice(["fp16", "bf16"]),
            help="For .plan: the type of products and of the cache; routers and norms stay in fp32. "
            "Default: bf16, or fp16 if the checkpoint is fp16 or fp32.",
        ),
        click.option(
            "--profile",
            "profiles",
            multiple=True,
            metavar="AXIS=MIN:OPT:MAX,...",
            help="For .plan: the sizes that it accepts, as in batch=1:8:32,sequence=1,past=1:256:2047; repeatable. "
            "Default: one for prompts and one for decoding.",
        ),
        click.option(
            "--no-build", "build", is_flag=True, flag_value=False, default=True,
            help="For .plan: do not build, but write everything that is needed to build on another machine.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def check_tensorrt_options(output: Path) -> None:
    """
    Raises:
        UserError: an option was given that has no effect on this kind of output.
    """
    without_effect, instead = (OF_ONNX, ".onnx") if output.suffix == ".plan" else (OPTIONS, ".plan")
    for name, option in given_options().items():
        if name in without_effect:
            raise UserError(f"{option} has no effect on {output}; leave it out, or end the output in {instead}", 2)


def checked_settings(options: dict[str, Any], model: Model, workload: tuple[int, int]) -> Settings:
    """The settings of the build. ``workload`` is the batch size and the sequence length for which default profiles are made.

    Raises:
        UserError: an option cannot be parsed, or see ``check_settings``.
    """
    from rq_compile.targets.tensorrt.compile import Settings, check_settings
    from rq_compile.targets.tensorrt.network import default_precision
    from rq_compile.targets.tensorrt.profiles import Profile, default_profiles

    if options["stock"] and options["plugins"]:
        raise UserError("--stock and --plugins exclude each other; leave one of the two out", 2)
    context = model.stated.get("max_position_embeddings")
    given = [Profile.parse(text) for text in options["profiles"]]
    settings = Settings(
        builder=options["builder"],
        profiles=given or default_profiles(*workload, context, _heads(model)),
        capabilities=capabilities_of(options["sm"]),
        precision=options["precision"] or default_precision(model),
        build=options["build"],
        plugins=options["plugins"],
    )
    check_settings(settings, model)
    return settings


def _heads(model: Model) -> int:
    """Attention heads of a layer, at most."""
    from rq_compile.architectures.config_values import values_of

    return max(values_of(model.text_config, "num_attention_heads"))


def compile_plan(
    screen: Screen,
    model: Model,
    plan: Plan,
    output: Path,
    settings: Settings,
    *,
    statistics: Statistics | None,
    threads: int | None,
) -> None:
    """Compile and show the result.

    Raises:
        UserError: see ``compile_tensorrt``.
    """
    from rq_compile.targets.tensorrt.compile import compile_tensorrt
    from rq_compile.targets.tensorrt.network import remark_on_precision

    heads = _heads(model)
    for profile in settings.profiles:
        screen.note(f"profile {profile}: up to {profile.most_scores(heads):.2g} attention scores per layer")
    if remark := remark_on_precision(model, settings.precision):
        screen.note(remark)
    if settings.builder == "tensorrt" and not {"plugins", "stock"} & given_options().keys():
        screen.note("MoE layers are built from standard ops; --plugins librq_tensorrt.so builds them with dedicated kernels")
    with screen.progress("compiling", "MB") as progress:
        manifest = compile_tensorrt(
            model,
            plan,
            output,
            settings,
            statistics=statistics,
            threads=threads,
            progress=lambda done, total: progress(done // MEGABYTE, total // MEGABYTE),
        )
    names = ", ".join([*(file.name for file in manifest.files.values()), output.with_suffix(".json").name])
    screen.note(f"wrote {names} in {output.parent}")
    if manifest.built is None:
        script, line = manifest.files["build script"].name, manifest.files["trtexec line"].name
        settings_name = manifest.files["build settings"].name
        screen.note(f"on the machine that has the GPU: python {script} {settings_name}, or sh {line}")
    screen.result(manifest, *tensorrt_tables(manifest, output), asked_for=False)


def capabilities_of(text: str | None) -> list[int]:
    """
    Raises:
        UserError: the text is not a list of numbers.
    """
    if text is None:
        return []
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise UserError(f"--sm {text} is not a list of compute capabilities; write for example --sm 80,89,120", 2)
    return sorted({int(number) for number in numbers})


def inspect_plan(screen: Screen, file: Path, *, verify: bool = False) -> None:
    """
    Raises:
        UserError: there is no manifest beside it or, with ``verify``, a file differs from the manifest.
    """
    from rq_compile.files import read_document, sha256
    from rq_compile.targets.tensorrt.manifest import Built, TensorRTManifest

    document, report = file.with_suffix(".json"), file.with_name(f"{file.name}.report.json")
    if not document.is_file():
        raise UserError(
            f"{file} has no manifest {document.name} beside it, and cannot be queried without a GPU; copy the manifest too",
            2,
        )
    manifest = read_document(TensorRTManifest, document)
    if manifest.built is None and report.is_file():
        manifest = manifest.model_copy(update={"built": read_document(Built, report)})
    if verify:
        for held in manifest.files.values():
            path = file.parent / held.name
            if not path.is_file() or sha256(path) != held.sha256:
                raise UserError(f"{path} is damaged or missing; copy it again or compile again")
        screen.note(f"{file}: every file is intact")
    screen.result(manifest, *tensorrt_tables(manifest, file))


def tensorrt_tables(manifest: TensorRTManifest, engine: Path) -> list[RenderableType]:
    from rq_compile.cli.tables import facts, megabytes, plan_tables, table

    built, size = manifest.built, engine.stat().st_size if engine.is_file() else None
    head: dict[str, object] = {
        "made_by": manifest.tool,
        "target": f"{manifest.target}, {manifest.precision}",
        "moe_layers": "plugins" if manifest.carries_code else "standard ops",
        "compute_capabilities": ", ".join(f"{n // 10}.{n % 10}" for n in manifest.compute_capabilities)
        or "the building machine's",
        "engine": megabytes(size) if size else "not built",
        "files": ", ".join(f"{file.name} ({megabytes(file.bytes)})" for file in manifest.files.values()),
        "replaced": ", ".join(f"{reason}: {count}" for reason, count in manifest.replaced.items()) or "nothing",
        "remarks": "; ".join(manifest.remarks) or "none",
    }
    if built is not None:
        head["built_by"] = f"{built.builder} in {built.build_seconds:.1f} s, read in {built.parse_seconds:.1f} s"
        head["weights"] = megabytes(built.weight_bytes)
        head["scratch_memory"] = ", ".join(map(megabytes, built.scratch_bytes))
        head["layers"] = ", ".join(f"{count} {kind}" for kind, count in built.engine_layers.items())
        head["network_layers"] = ", ".join(f"{count} {kind}" for kind, count in built.network_layers.items())
    bindings = table("inputs and outputs", "name", "type", "shape", "")
    for way, found in (("in", manifest.inputs), ("out", manifest.outputs)):
        for binding in found:
            bindings.add_row(binding.name, binding.dtype, " x ".join(map(str, binding.shape)), way)
    return [facts("engine", **head), bindings, profiles_table(manifest.profiles), *plan_tables(manifest.plan)]


def profiles_table(profiles: list[Profile]) -> RenderableType:
    from rq_compile.cli.tables import table

    made = table("profiles (min : opt : max)", "profile", "batch", "sequence", "past")
    for number, profile in enumerate(profiles):
        made.add_row(str(number), *map(range_of, (profile.batch, profile.sequence, profile.past)))
    return made


def range_of(sizes: Range) -> str:
    return str(sizes.best) if sizes.least == sizes.most else f"{sizes.least} : {sizes.best} : {sizes.most}"
