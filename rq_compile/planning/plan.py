"""Makes a plan from a calibration: checks the options, runs a policy, and compares its slots with the unplanned model."""

import importlib
from dataclasses import replace
from typing import Any, cast, get_args

from pydantic import ValidationError

from rq_compile import __version__
from rq_compile.bounds import MOST_COUNTED, MOST_MEMORY, MOST_RANKS, Count, NonNegative, Share
from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.planning.budget import allowed, enough_for, over_budget
from rq_compile.planning.dense import check_target_of_whole, whole_of
from rq_compile.planning.engine_bytes import decided_within, engine_file_bytes, smallest_engine, whole_remark
from rq_compile.planning.few_bits import or_fewer_bits
from rq_compile.planning.policies.none import unplanned
from rq_compile.planning.policies.optimal import Options as OptimalOptions
from rq_compile.planning.prediction import predict, with_capacity_classes
from rq_compile.planning.problem import Decision, Layer, Problem, problem_of
from rq_compile.planning.remarks import remarks
from rq_compile.planning.schema import LayerPlan, Plan, PlannedModule, Policy, Slot, Target
from rq_compile.quantization.formats import SLOT_FORMATS

POLICIES: tuple[Policy, ...] = get_args(Policy)
CHOOSE_FORMATS: tuple[Policy, ...] = ("optimal", "uniform", "frequency", "random")


class CommonOptions(Document):
    """Options of every policy. ``smoothing`` and ``worst_text``: see ``demand.demand``. ``tokens``: tokens of the step that the
    plan is made for, and whose time is predicted; 0 means a calibration batch and, for policy ``optimal`` with several ranks,
    also one token of each of its sequences."""

    smoothing: NonNegative = 1.0
    worst_text: Share = 1.0
    tokens: Count = 0


DATA_FREE = (
    "No text was run (calibrate --data-free): loads are assumed to be uniform, so nothing is balanced, and errors are estimated "
    "from the weights alone; calibrate on text for a plan that fits the model's real loads."
)


def make_plan(
    calibration: Calibration,
    *,
    policy: str,
    memory: float | None,
    ranks: int,
    target: str,
    engine_bytes: int | None = None,
    calibration_sha256: str | None = None,
    **options: Any,
) -> Plan:
    """Decide how often, in which format and on which rank each expert is stored.

    The plan takes at most ``memory`` times the bytes of the experts as the checkpoint stores them, including scales. None means
    1 or, if a quantized checkpoint stores its experts in fewer bytes than any slot takes, the least that works. With
    ``engine_bytes`` (policy ``optimal``), the engine's weights file takes at most so many bytes, and the plan also chooses the
    formats of the non-expert modules. ``options`` are those of ``CommonOptions`` and of the policy's ``Options``. The same
    arguments give the same plan.

    Raises:
        UserError: an unknown policy, target or option, a value out of range, or a budget that cannot be met.
    """
    common, own = check_arguments(
        policy=policy, memory=memory, ranks=ranks, target=target, options=options, engine_bytes=engine_bytes
    )
    module = importlib.import_module(f"rq_compile.planning.policies.{policy}")
    whole = None if engine_bytes is None else whole_of(calibration, engine_bytes, cast(Target, target))
    problem = problem_of(
        calibration,
        target=cast(Target, target),
        ranks=ranks,
        memory=memory or 1.0,
        smoothing=common.smoothing,
        worst_text=common.worst_text,
        tokens=common.tokens,
        whole=whole,
    )
    if memory is None and whole is None:
        problem = replace(problem, memory=least_memory(problem, policy))
    if problem.whole is None:
        decision: Decision = module.decide(problem, own)
    else:
        problem, decision = decided_within(problem, cast(OptimalOptions, own))
        assert problem.whole
        left = problem.budget - problem.whole.bytes_of(decision.dense or [])
        problem = replace(problem, memory=min(left / problem.bytes_before, MOST_MEMORY))
    memory = problem.memory
    layers = [
        layer_plan(problem, layer, slots, calibration.batch_size, problem.tokens)
        for layer, slots in zip(problem.layers, decision.slots, strict=True)
    ]
    taken = sum(problem.cost.bytes_taken(layer.geometry, layer.slots) for layer in layers)
    if taken > allowed(memory, problem.bytes_before):
        excess = taken - allowed(memory, problem.bytes_before)
        fewer = or_fewer_bits(problem, excess) if policy in CHOOSE_FORMATS and not options.get("format") else ""
        alternative = fewer or ", or --policy optimal"
        raise over_budget(taken, memory, problem.bytes_before, f"policy {policy}", alternative=alternative)
    dense = [item.planned(format) for item, format in zip(problem.dense, decision.dense or [0] * len(problem.dense), strict=True)]
    return Plan(
        tool=f"rq-compile {__version__}",
        model=calibration.model,
        model_type=calibration.model_type,
        fingerprint=calibration.fingerprint,
        calibration_sha256=calibration_sha256,
        quantizer=calibration.quantizer,
        statistics=calibration.statistics,
        policy=policy,
        options={**common.model_dump(), **own.model_dump()},
        target=target,
        memory=memory,
        ranks=ranks,
        optimality=decision.optimality,
        remarks=[
            *([DATA_FREE] if calibration.data_free else []),
            *([whole_remark(problem.whole, problem, decision)] if problem.whole else []),
            *remarks(problem, layers),
            *decision.remarks,
        ],
        extra_layers=calibration.extra_layers,
        layers=layers,
        engine_bytes=engine_bytes,
        dense=dense,
        predicted_engine_bytes=engine_file_bytes(problem, decision) if problem.whole else None,
        model_error=_model_error(layers, dense) if problem.whole else None,
    )


def check_arguments(
    *,
    policy: str,
    memory: float | None,
    ranks: int,
    target: str,
    options: dict[str, Any],
    engine_bytes: int | None = None,
) -> tuple[CommonOptions, Document]:
    """Check those arguments of ``make_plan`` that do not need the calibration. Returns the validated options.

    Raises:
        UserError: an unknown policy or target, an option that the policy does not have, or a value out of range.
    """
    if policy not in POLICIES:
        raise UserError(f"there is no policy {policy}; choose one of {', '.join(POLICIES)}", 2)
    if target not in get_args(Target):
        raise UserError(f"there is no target {target}; choose one of {', '.join(get_args(Target))}", 2)
    if memory is not None and not 0 < memory <= MOST_MEMORY:
        raise UserError(f"cannot plan for memory {memory:g}; give --memory above 0 and up to {MOST_MEMORY:g}", 2)
    if engine_bytes is not None and memory is not None:
        raise UserError(f"--memory {memory:g} and --engine-bytes {engine_bytes} are two budgets; leave one of them out", 2)
    if engine_bytes is not None and policy != "optimal":
        raise UserError(f"--engine-bytes is for policy optimal, not for {policy}; give --memory, or leave --policy out", 2)
    if engine_bytes is not None:
        check_target_of_whole(cast(Target, target))
    if engine_bytes is not None and not 1 <= engine_bytes <= MOST_COUNTED:
        raise UserError(f"cannot plan for an engine of {engine_bytes} bytes; give --engine-bytes from 1 to 2^53", 2)
    if not 1 <= ranks <= MOST_RANKS:
        raise UserError(f"cannot plan for {ranks} ranks; give --ranks from 1 to {MOST_RANKS}", 2)
    own: type[Document] = importlib.import_module(f"rq_compile.planning.policies.{policy}").Options
    known = [*CommonOptions.model_fields, *own.model_fields]
    for name in options:
        if name not in known:
            raise UserError(f"policy {policy} has no option {name}; choose one of {', '.join(known)}", 2)
    try:
        common = CommonOptions(**{name: value for name, value in options.items() if name in CommonOptions.model_fields})
        return common, own(**{name: value for name, value in options.items() if name in own.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise UserError(
            f"option {name} of policy {policy} cannot be {options[name]!r} ({first['msg']}); correct --option {name}", 2
        ) from error


def least_engine_bytes(calibration: Calibration, *, ranks: int, target: str, options: dict[str, Any]) -> int:
    """The least ``engine_bytes`` that a plan can have.

    Raises:
        UserError: see ``make_plan``.
    """
    common, own = check_arguments(policy="optimal", memory=None, ranks=ranks, target=target, options=options)
    whole = whole_of(calibration, MOST_COUNTED, cast(Target, target))
    problem = problem_of(
        calibration,
        target=cast(Target, target),
        ranks=ranks,
        memory=1.0,
        smoothing=common.smoothing,
        worst_text=common.worst_text,
        whole=whole,
    )
    return smallest_engine(problem, cast(OptimalOptions, own))


def _model_error(layers: list[LayerPlan], dense: list[PlannedModule]) -> float:
    """Errors of experts and modules in nats, see ``DenseCalibration``."""
    return sum(layer.predicted.error for layer in layers) + sum(module.error for module in dense)


def least_memory(problem: Problem, policy: str) -> float:
    """1, or the least memory, rounded up, that holds every expert once."""
    return max(1.0, enough_for(least_bytes(problem, policy), problem.bytes_before))


def least_bytes(problem: Problem, policy: str) -> int:
    """Bytes of every expert once: in the smallest format that computes it if the policy chooses formats, otherwise in the
    checkpoint's format."""

    def of_expert(layer: Layer) -> int:
        sizes = [int(size) for format, size in zip(layer.formats, layer.size, strict=True) if SLOT_FORMATS[format].computed]
        return min(sizes) if policy in CHOOSE_FORMATS else max(sizes)

    return sum(layer.experts * of_expert(layer) for layer in problem.layers)


def layer_plan(problem: Problem, layer: Layer, slots: list[Slot], batch_size: int, tokens: int) -> LayerPlan:
    """``slots`` with all predictions about them, compared with the unplanned layer."""
    known = layer.calibration
    before = with_capacity_classes(known, unplanned(layer.experts, problem))
    after = with_capacity_classes(known, slots)
    predicted = predict(
        *(known, before, after, problem.cost),
        dtype=problem.dtype,
        batch_size=batch_size,
        tokens=tokens,
        weight=layer.weight,
    )
    return LayerPlan(
        name=known.name,
        index=known.index,
        geometry=known.geometry,
        slots=after,
        unreached=[expert for expert, count in enumerate(known.load) if count == 0],
        predicted=predicted,
    )
