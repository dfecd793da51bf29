"""``sweep.json``: plans for a range of budgets side by side, so that a person can choose how much memory to give."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
from pydantic import Field, model_validator

from rq_compile import __version__
from rq_compile.bounds import MOST_MEMORY, MOST_RANKS, Count, Imbalance, NonNegative, Positive, Sha256
from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.files import Document, Name
from rq_compile.planning.budget import enough_for
from rq_compile.planning.costs import CostModel
from rq_compile.planning.dense import FORMATS as DENSE_FORMATS
from rq_compile.planning.engine_bytes import smallest_engine_error
from rq_compile.planning.plan import check_arguments, least_bytes, least_engine_bytes, make_plan
from rq_compile.planning.problem import problem_of
from rq_compile.planning.schema import LayerPlan, Plan, Policy, Target
from rq_compile.quantization.formats import FORMATS, Format, PlannedDense
from rq_compile.versions import Versioned

POINTS = 12
# Above this budget, memory only buys more replicas.
ROOM_FOR_REPLICAS = 1.25


class SweepPoint(Document):
    """The plan for one budget, over all layers.

    ``memory``: the budget, as in a plan. ``bytes``: those that count toward it (``CostModel.bytes_taken``). ``error`` and
    ``lis``: means over the layers. ``step_time`` and ``token_time``: times of all layers, divided by those of the model without a
    plan; None if unknown. ``slots``: number of slots by format. If the budget is that of an engine: ``engine_bytes`` is the
    budget, ``predicted_engine_bytes`` and ``model_error`` are those of the plan, and ``modules`` is the number of non-expert
    modules by format.
    """

    memory: float = Field(gt=0, le=MOST_MEMORY)
    bytes: Count
    error: NonNegative
    lis: Imbalance
    step_time: Positive | None = None
    token_time: Positive | None = None
    replicas: Count
    slots: dict[Format, Count]
    engine_bytes: Count | None = None
    predicted_engine_bytes: Count | None = None
    model_error: NonNegative | None = None
    modules: dict[PlannedDense, Count] = Field(default={})

    @property
    def budget(self) -> float:
        return self.memory if self.engine_bytes is None else self.engine_bytes

    @property
    def budget_told(self) -> str:
        return f"{self.memory:g}" if self.engine_bytes is None else f"{self.engine_bytes / 1e6:.2f} MB"

    @property
    def bytes_taken(self) -> int:
        """Those that count toward the budget."""
        return self.bytes if self.predicted_engine_bytes is None else self.predicted_engine_bytes

    @property
    def error_within(self) -> float:
        """The error of what the budget is for: ``model_error`` or ``error``."""
        return self.error if self.model_error is None else self.model_error

    @property
    def of_experts(self) -> Self:
        """The point in a sweep over budgets of experts."""
        return self.model_copy(update={"engine_bytes": None, "predicted_engine_bytes": None, "model_error": None})


class Sweep(Versioned):
    called: ClassVar[str] = "sweep"
    command: ClassVar[str] = "rq-compile plan --sweep"

    schema_version: Literal[1] = 1
    kind: Literal["sweep"] = "sweep"
    tool: str
    model: Name
    model_type: str
    fingerprint: Sha256
    calibration_sha256: Sha256 | None
    policy: Policy
    options: dict[str, str | int | float | bool] = Field(default={})
    target: Target
    ranks: int = Field(default=1, ge=1, le=MOST_RANKS)
    bytes_before: Count
    remarks: list[str] = Field(default=[])
    points: list[SweepPoint] = Field(min_length=1, description="in the order of their budgets")

    @property
    def of_engines(self) -> bool:
        """Whether the budgets are those of whole engines."""
        return self.points[0].engine_bytes is not None

    @model_validator(mode="after")
    def budgets_rise(self) -> Self:
        if len({point.engine_bytes is None for point in self.points}) > 1:
            raise ValueError("some budgets are those of experts, and others those of engines")
        budgets = [point.budget for point in self.points]
        for budget, following in pairwise(budgets):
            if following <= budget:
                raise ValueError(f"budget {following:g} follows {budget:g}; each must be larger than the one before")
        return self


def make_sweep(
    calibration: Calibration,
    *,
    policy: str,
    ranks: int,
    target: str,
    budgets: Sequence[float] | None = None,
    engine_budgets: Sequence[int] | None = None,
    engine_bytes: int | None = None,
    calibration_sha256: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Sweep:
    """Plan for each of ``budgets``, in multiples of the experts' bytes in the checkpoint, or of ``engine_budgets``, in bytes of
    the engine's weights file. The other arguments are those of ``make_plan``.

    The default is ``POINTS`` budgets, evenly spread: from the smallest engine to ``engine_bytes`` or, without it, from the least
    that holds every expert to 1.25. A budget that the policy cannot meet is left out with a remark. The same arguments give the
    same sweep.

    Raises:
        UserError: see ``make_plan``; no budget can be met.
    """
    largest = max(engine_budgets, default=None) if engine_budgets else engine_bytes
    common, own = check_arguments(policy=policy, memory=None, ranks=ranks, target=target, options=options, engine_bytes=largest)
    asked: list[dict[str, Any]]
    if engine_budgets:
        asked = [{"memory": None, "engine_bytes": size} for size in sorted(set(engine_budgets))]
    elif engine_bytes is not None:
        sizes = _engine_spread(calibration, engine_bytes, ranks, target, options)
        asked = [{"memory": None, "engine_bytes": size} for size in sizes]
    else:
        asked = [{"memory": memory} for memory in sorted(set(budgets or _spread(calibration, policy, ranks, target)))]
    plans: list[Plan] = []
    left_out: list[str] = []
    problem = ""
    for done, budget in enumerate(asked):
        progress(done, len(asked))
        try:
            plans.append(make_plan(calibration, policy=policy, ranks=ranks, target=target, **budget, **options))
        except UserError as error:
            problem, _, _ = str(error).partition("; ")
            left_out.append(_told(budget))
    progress(len(asked), len(asked))
    if not plans:
        raise UserError(
            f"policy {policy} cannot meet any budget up to {_told(asked[-1])}: {problem}; "
            "give larger --budgets, or leave them out"
        )
    return Sweep(
        tool=f"rq-compile {__version__}",
        model=calibration.model,
        model_type=calibration.model_type,
        fingerprint=calibration.fingerprint,
        calibration_sha256=calibration_sha256,
        policy=cast(Policy, policy),
        options={**common.model_dump(), **own.model_dump()},
        target=cast(Target, target),
        ranks=ranks,
        bytes_before=plans[0].bytes_before,
        remarks=[f"Policy {policy} cannot meet these budgets: {', '.join(left_out)}."] if left_out else [],
        points=[point_of(plan) for plan in plans],
    )


def _told(budget: dict[str, Any]) -> str:
    size = budget.get("engine_bytes")
    return f"{budget['memory']:g}" if size is None else f"{size} bytes"


def _engine_spread(calibration: Calibration, most: int, ranks: int, target: str, options: dict[str, Any]) -> list[int]:
    """
    Raises:
        UserError: ``most`` is less than the smallest engine.
    """
    least = least_engine_bytes(calibration, ranks=ranks, target=target, options=options)
    if least > most:
        raise smallest_engine_error(least, most)
    return sorted({round(size) for size in np.linspace(least, most, POINTS)})


def _spread(calibration: Calibration, policy: str, ranks: int, target: str) -> Iterator[float]:
    problem = problem_of(calibration, target=cast(Target, target), ranks=ranks, memory=1.0, smoothing=0.0)
    least = enough_for(least_bytes(problem, policy), problem.bytes_before)
    # A quantized checkpoint may hold its experts in fewer bytes than any slot.
    most = max(ROOM_FOR_REPLICAS, least * ROOM_FOR_REPLICAS)
    inner = np.linspace(least, most, POINTS)[1:]
    yield from sorted({least, *(round(float(budget), 3) for budget in inner)})


def point_of(plan: Plan) -> SweepPoint:
    slots = Counter(slot.format for layer in plan.layers for slot in layer.slots)
    modules = Counter(module.format for module in plan.dense)
    cost = CostModel(plan.target, plan.ranks)
    return SweepPoint(
        memory=plan.memory,
        bytes=sum(cost.bytes_taken(layer.geometry, layer.slots) for layer in plan.layers),
        error=fmean(layer.predicted.error for layer in plan.layers),
        lis=fmean(layer.predicted.lis_after for layer in plan.layers),
        step_time=_time(plan.layers, "step"),
        token_time=_time(plan.layers, "token"),
        replicas=sum(len(layer.slots) - layer.geometry.experts for layer in plan.layers),
        slots={format: slots[format] for format in FORMATS if slots[format]},
        engine_bytes=plan.engine_bytes,
        predicted_engine_bytes=plan.predicted_engine_bytes,
        model_error=plan.model_error,
        modules={format: modules[format] for format in DENSE_FORMATS if modules[format]},
    )


def _time(layers: list[LayerPlan], of: Literal["step", "token"]) -> float | None:
    before, after = ([getattr(layer.predicted, f"{of}_time_{when}") for layer in layers] for when in ("before", "after"))
    return None if None in before or None in after else sum(after) / sum(before)
