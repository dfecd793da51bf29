"""The stages: each reads and writes the same files as the command of the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rq_compile.api.arguments import LOG, File, Progress, Texts, contents, files, is_file, opened, silent
from rq_compile.api.engine import Engine
from rq_compile.calibration.lengths import TOKENS
from rq_compile.errors import UserError
from rq_compile.quantization.formats import MEASURED_FORMATS, DenseFormat

if TYPE_CHECKING:
    from rq_compile.architectures.model import Model
    from rq_compile.calibration.schema import Calibration
    from rq_compile.calibration.statistics import Statistics
    from rq_compile.engine.manifest import LoweringName, Manifest
    from rq_compile.lowerings import Lowering
    from rq_compile.planning.schema import Plan
    from rq_compile.quantization.formats import Block, Format, Quantizer

ActivationBits = Literal[8, 32]
# Options of lowerings, and their possible values.
OPTIONS: dict[str, Any] = {"activation_bits": ActivationBits, "dense_format": DenseFormat}


def open(checkpoint: File) -> Model:
    """Open a Hugging Face checkpoint folder. Reads its config and the headers of its tensors, but no weights.

    Raises:
        UserError: the folder is not a sparse MoE model of a supported family and storage format, or its files disagree.
    """
    return opened(checkpoint)


def calibrate(
    model: Model | File,
    texts: Texts,
    output: File,
    *,
    tokens: int | None = TOKENS,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    quantizer: Quantizer = "gptq",
    block: Block | None = None,
    formats: Sequence[Format] = MEASURED_FORMATS,
    wanda_fraction: float = 0.5,
    memory_limit: int | None = None,
    device: str = "cpu",
    fresh: bool = False,
    progress: Progress | None = None,
    detail: Callable[[str], None] | None = None,
) -> Calibration:
    """Run ``model`` over ``texts``, measure its experts and write the calibration to ``output`` (``.json``).

    At most ``tokens`` tokens are run, the first of every text (None: all), in sequences of ``sequence_length`` (None: 2048, or as
    many as the model has positions), ``batch_size`` together (None: up to 8, of 2048 tokens in all).

    ``formats``: those that experts are rounded to and measured in, of "int8", "int4", "int3" and "int2", which all take about as
    much time; and "constant", which replaces an expert by its mean output. Plans can use only what was measured.

    ``progress`` counts tokens. ``detail`` gets the layer that is being measured. ``memory_limit`` is in bytes. ``wanda_fraction``
    is the paper's s. The statistics that GPTQ needs are written beside ``output`` as ``.safetensors``. An interrupted run with
    the same arguments continues after its last finished layer, unless ``fresh``.

    Raises:
        UserError: ``output`` would replace an input or a file of another kind, there is no text, the text is too short, or one
            layer does not fit into the memory limit.
    """
    from rq_compile.calibration.written import calibrated_into
    from rq_compile.outputs import check_calibration

    path = Path(output)
    check_calibration(path, files(texts), statistics=quantizer == "gptq" or "constant" in formats)
    source = opened(model)
    return calibrated_into(
        path,
        source,
        contents(texts, source),
        fresh=fresh,
        remark=LOG.info,
        tokens=tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        progress=progress or silent,
        detail=detail or silent,
        quantizer=quantizer,
        block=block,
        formats=formats,
        wanda_fraction=wanda_fraction,
        memory_limit=memory_limit,
        device=device,
    )


def plan(
    calibration: File | Model,
    output: File,
    *,
    policy: str = "optimal",
    memory: float | None = None,
    engine_bytes: int | None = None,
    ranks: int = 1,
    target: str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Decide how often, in which format and on which rank each expert is stored, and write the plan to ``output`` (``.json``).

    Instead of ``calibration``, a model may be given: loads are then assumed to be uniform, errors come from the weights alone,
    and ``progress`` counts experts. ``memory`` is the budget as a multiple of the bytes of the experts in the checkpoint.
    ``engine_bytes`` is the budget of the engine's whole weights file instead; the plan then also decides the formats of the
    non-expert weights. ``options`` are those of ``--option``: see docs/planning.md.

    Raises:
        UserError: ``output`` would replace an input or a file of another kind, the calibration cannot be read, an argument is
            unknown or out of range, or the budget cannot be met.
    """
    from rq_compile.calibration.schema import Calibration
    from rq_compile.files import read_document, sha256, write_document
    from rq_compile.outputs import check_outputs, document
    from rq_compile.planning.plan import check_arguments, make_plan

    path = Path(output)
    how: dict[str, Any] = {"policy": policy, "memory": memory, "ranks": ranks, "target": target}
    source = Path(calibration) if is_file(calibration) else calibration.path
    check_outputs({path: document("plan")}, [source])
    check_arguments(**how, options=options, engine_bytes=engine_bytes)
    how["engine_bytes"] = engine_bytes
    if is_file(calibration):
        made = make_plan(read_document(Calibration, source), **how, calibration_sha256=sha256(source), **options)
    else:
        from rq_compile.calibration.data_free import data_free

        made = make_plan(data_free(calibration, progress=progress or silent), **how, **options)
    if made.statistics:
        made = made.model_copy(update={"statistics": made.statistics.named_from(source.parent, path)})
    write_document(made, path)
    return made


def merge(calibrations: Sequence[File] | Mapping[Path, float | None] | Mapping[str, float | None], output: File) -> Calibration:
    """Make one calibration from several calibrations of a model on different texts, and write it to ``output`` (``.json``).

    ``calibrations``: files, or files and their weights. A weight is a share of the traffic: with weights 3 and 1, the texts of
    the first count as three quarters of all tokens, however long they are. Without weights, every token counts once.

    Raises:
        UserError: ``output`` would replace an input or a file of another kind, or the calibrations are not at least two of one
            model, measured alike on different texts.
    """
    from rq_compile.calibration.merge import merged_into
    from rq_compile.outputs import check_calibration

    weighted = calibrations.items() if isinstance(calibrations, Mapping) else ((path, None) for path in calibrations)
    several = {Path(path): weight for path, weight in weighted}
    check_calibration(Path(output), several, statistics=True)
    different = len({path.resolve() for path in several})
    if different < max(2, len(calibrations)):
        raise UserError(
            f"merge needs at least two different calibrations, but {len(calibrations)} paths name {different}; give each once", 2
        )
    if wrong := [weight for weight in several.values() if weight is not None and not 0 < weight < inf]:
        raise UserError(f"a calibration cannot have the weight {wrong[0]}; give a number above 0", 2)
    return merged_into(Path(output), several)


def compile(
    model: Model | File,
    plan: File | Plan,
    output: File,
    *,
    statistics: Statistics | None = None,
    lowering: LoweringName | None = None,
    activation_bits: ActivationBits | None = None,
    dense_format: DenseFormat | None = None,
    link_weights: bool = False,
    threads: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Compile ``model`` with ``plan`` into an engine for ONNX Runtime: ``output`` (``.onnx``) and the files beside it, or the
    folder ``output`` with a graph for each rank of the plan.

    ``statistics``: those of the plan's calibration, by default read from the file that ``plan`` names. ``lowering``: by default
    the lowering for the plan's target. ``activation_bits`` and ``dense_format`` are options of some lowerings. ``link_weights``:
    use weights of the checkpoint in place where the layout allows. ``progress`` counts bytes of weights. The engine does not
    depend on ``threads``.

    Raises:
        UserError: ``output`` would replace another file, the plan is of another model or does not fit the lowering, the lowering
            does not have an option, or the disk is full.
    """
    from rq_compile.lowerings import lowering_for
    from rq_compile.outputs import check_outputs
    from rq_compile.targets.engine_outputs import check_engine_path, onnx_outputs
    from rq_compile.targets.onnxruntime import Writing, compile_engine
    from rq_compile.targets.preflight import check_dense_format, remarks_before

    source, path = opened(model), Path(output)
    if is_file(plan):
        from rq_compile.files import read_document
        from rq_compile.planning.schema import Plan
        from rq_compile.targets.preflight import check_same_model

        document = read_document(Plan, Path(plan))
        check_same_model(document, source, Path(plan))
    else:
        document = plan
    options = {"activation_bits": activation_bits, "dense_format": dense_format}
    check_dense_format(document, dense_format)
    processes = document.ranks if path.suffix != ".onnx" else 1
    realised = _lowering(lowering or lowering_for(document.target, processes).name, options)
    check_engine_path(path, of_ranks=realised.of_ranks, ranks=document.ranks)
    outputs = onnx_outputs(path, source.path, link_weights=link_weights, ranks=document.ranks if realised.of_ranks else 0)
    check_outputs(outputs, [Path(plan)] if is_file(plan) else [])
    if is_file(plan) and statistics is None and document.statistics is not None:
        from rq_compile.calibration.statistics import Statistics

        statistics = Statistics.beside(Path(plan).parent, document.statistics)
    for remark in remarks_before(source, document, realised):
        LOG.info(remark)
    writing = Writing(threads, fresh, progress, LOG.info)
    return compile_engine(source, document, path, realised, statistics, link_weights=link_weights, writing=writing)


def load(engine: File, threads: int | None = None) -> Engine:
    """Load the engine at ``engine``: an ``.onnx`` file, or the folder of an engine of several ranks, which all processes load
    (docs/ranks.md). Needs only the packages of a plain install, neither torch nor transformers.

    Raises:
        UserError: a file of the engine is missing or damaged, or ONNX Runtime cannot run it here.
    """
    return Engine.load(Path(engine), threads)


def _lowering(name: str, options: dict[str, Any]) -> Lowering:
    """The lowering with those of ``options`` that are not None. It must have all of these options."""
    from rq_compile.lowerings import LOWERINGS

    if name not in LOWERINGS:
        raise UserError(f"there is no lowering {name}; choose one of {', '.join(LOWERINGS)}", 2)
    kind = LOWERINGS[name]
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in kind.options:
            raise UserError(f"{option} {value} has no effect with lowering {name}; leave it out, or use lowering native", 2)
        if (known := get_args(OPTIONS[option])) and value not in known:
            raise UserError(f"{option} cannot be {value}; choose one of {', '.join(map(str, known))}", 2)
    return kind(**given)
