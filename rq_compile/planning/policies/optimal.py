"""Policy ``optimal``: copies, formats and ranks of all layers together, for the least predicted cost within the budget.

What is minimised, summed over the layers (weights are options, loads are those of the worst calibration text):

    error  +  balance * max(0, imbalance - 1 - tolerance)  +  hedge * max(0, drift imbalance - 1 - tolerance)

*error* is the layer's relative output error, the sum of its experts' measured ones. *imbalance* is what the target waits for: the
busiest slot (LIS) of a batched lowering, the busiest of several ranks, nothing at all for ragged kernels on one rank, where the
memory goes to bits alone. With ``balance`` 1, a layer that is a tenth out of balance costs as much as an output that is off by
a tenth of its energy. So in practice every layer is first balanced to the tolerance, in whatever formats that takes, and then
the bytes left buy bits where they save most error. *drift imbalance* is the busiest slot if any one expert may gain ``drift``
mean loads, as happens on text of a kind that nobody calibrated on (``demand.drift_gain``). It counts only once the texts are
balanced, and little: on four trained models (benchmarks/balance.py) ``hedge`` 0.0002 balances text of another kind as well as
0.01 does, and 0.01 pays for that with int4 where int8 would fit.

So a plan that balances what policy ``paper`` leaves unbalanced stores more experts in int8, and its error is then above that of
the paper, which leaves most experts as they are; both are far below what a perplexity shows. Where the budget holds replicas in
the checkpoint's own format, or cold experts make room for them at less error, that is what the objective finds.

All copies of an expert share a format, so that an answer does not depend on who shares the batch; ``mixed_copies`` lifts that.
``max_error`` is a bound on the mean error of a layer; where it binds, balance gives way, in all layers alike: the imbalance that
costs nothing is raised until the error fits. (Weighing imbalance less would leave only the convex hull of what can be had.) On a
target that waits for nothing, the plan with ``max_error`` takes the fewest bytes that keep to it: they are what a step costs.

With several ranks every layer gets the same number of slots and every rank its equal share of them, as serving systems need.
Optimality is proved by the bound that stands in the plan: for one rank it is usually met exactly (``allocation``, ``exact``), for
several the packing leaves a gap (``rank_solver``).
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from pydantic import Field

from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.planning.allocation import slot_experts
from rq_compile.planning.budget import over_budget
from rq_compile.planning.knapsack import smallest_formats
from rq_compile.planning.problem import Decision, Layer, Problem
from rq_compile.planning.rank_solver import solve_on_ranks
from rq_compile.planning.schema import Optimality, Slot
from rq_compile.planning.solver import ROUNDING, Objective, Solution, solve_on_one_rank
from rq_compile.quantization.formats import FLOAT_FORMATS, Format

HALVINGS = 20


class Options(Document):
    """``formats``: the only ones to use, separated by commas; empty for all that were measured. ``max_error`` 0: no bound."""

    tolerance: float = Field(default=0.01, ge=0)
    balance: float = Field(default=1.0, ge=0)
    drift: float = Field(default=1.0, ge=0)
    hedge: float = Field(default=0.0002, ge=0)
    max_error: float = Field(default=0.0, ge=0)
    mixed_copies: bool = False
    formats: str = ""


def decide(problem: Problem, options: Options) -> Decision:
    """
    Raises:
        UserError: the budget does not hold every expert once, ``max_error`` cannot be kept, or ``formats`` names one that was
            not measured.
    """
    allowed = _allowed_formats(problem, options.formats)
    _check_budget(_with_formats(problem, allowed))
    # An engine holds one float format, so each that is smaller than the checkpoint's own is an alternative to it.
    floats = [format for format in FLOAT_FORMATS if format in allowed]
    solutions = [
        _solution(_with_formats(problem, [format for format in allowed if format == one or format not in floats]), options)
        for one in floats or allowed[:1]
    ]
    found = [solution for solution in solutions if solution is not None and np.isfinite(solution.value)]
    if not found:
        raise UserError(
            f"no plan within --memory {problem.memory:g} keeps the mean error of a layer below max_error {options.max_error:g}; "
            "raise one of the two"
        )
    best = min(found, key=lambda solution: solution.value)
    bound = min(solution.bound for solution in found)
    optimality = Optimality(objective=best.value, bound=bound)
    return Decision(_slots(problem, best), optimality, _unbalanced(problem, best, options.tolerance))


def _slots(problem: Problem, solution: Solution) -> list[list[Slot]]:
    """Rank after rank; on a rank, first copies come before second ones."""
    layers = []
    for layer, solved in zip(problem.layers, solution.layers, strict=True):
        experts, format, ranks = slot_experts(solved.choice.copies), solved.choice.format, solved.ranks
        order = np.argsort(ranks, kind="stable")
        layers.append([Slot(expert=int(experts[s]), format=layer.formats[format[s]], rank=int(ranks[s])) for s in order])
    return layers


def _unbalanced(problem: Problem, solution: Solution, tolerance: float) -> list[str]:
    if problem.cost.busiest == "nothing":
        return []
    missed = sum(layer.imbalance > 1 + tolerance + ROUNDING for layer in solution.layers)
    if not missed:
        return []
    return [
        f"In {missed} of {len(problem.layers)} layers some calibration text stays more than {100 * tolerance:g} % out of "
        "balance; more --memory would help."
    ]


def _allowed_formats(problem: Problem, names: str) -> list[Format]:
    """
    Raises:
        UserError: a name that a layer has no measured errors for.
    """
    measured = [format for format in problem.layers[0].formats if all(format in layer.formats for layer in problem.layers)]
    wanted = [name.strip() for name in names.split(",")] if names else measured
    for name in wanted:
        if name not in measured:
            raise UserError(f"option formats names {name}, but the experts were measured in {', '.join(measured)}", 2)
    return [format for format in measured if format in wanted]


def _with_formats(problem: Problem, allowed: list[Format]) -> Problem:
    """``problem`` in which every other format is impossible."""

    def restricted(layer: Layer) -> Layer:
        error = layer.error.copy()
        error[:, [format not in allowed for format in layer.formats]] = np.inf
        return replace(layer, error=error)

    return replace(problem, layers=tuple(restricted(layer) for layer in problem.layers))


def _check_budget(problem: Problem) -> None:
    """
    Raises:
        UserError: the budget does not hold every expert once in its smallest format, or an expert has no format.
    """
    least = 0
    for layer in problem.layers:
        possible = np.isfinite(layer.error).any(axis=1)
        if not possible.all():
            index = layer.calibration.index
            raise UserError(f"expert {possible.argmin()} of layer {index} fits no format; allow more with --option formats", 2)
        least += int(layer.size[smallest_formats(layer.error, layer.size[None])].sum())
    if least > problem.budget:
        raise over_budget(least, problem.memory, problem.bytes_before, "one slot an expert in its smallest format")


def _solution(problem: Problem, options: Options) -> Solution | None:
    """The best solution that keeps to ``max_error``; None if there is none."""
    objective = Objective(1 + options.tolerance, options.balance, options.drift, options.hedge, options.mixed_copies)
    solve = solve_on_ranks if problem.ranks > 1 else solve_on_one_rank
    if not options.max_error:
        return solve(problem, objective, problem.budget)

    def fewer_bytes(part: float) -> Solution | None:
        return solve(problem, objective, int(problem.budget * (1 - part)))

    def more_balance(part: float) -> Solution | None:
        worst = max(layer.experts for layer in problem.layers)
        eased = replace(objective, goal=objective.goal**part * worst ** (1 - part), hedge=part * objective.hedge)
        return solve(problem, eased, problem.budget)

    return _furthest(fewer_bytes if problem.cost.busiest == "nothing" else more_balance, problem, options.max_error)


def _furthest(solution: Callable[[float], Solution | None], problem: Problem, max_error: float) -> Solution | None:
    """The solution of the largest part in [0, 1] that keeps to ``max_error``; the error grows with the part."""

    def kept(part: float) -> Solution | None:
        found = solution(part)
        return found if found is not None and _mean_error(problem, found) <= max_error else None

    if (whole := kept(1.0)) is not None:
        return whole
    best, low, high = kept(0.0), 0.0, 1.0
    for _ in range(HALVINGS if best is not None else 0):
        middle = (low + high) / 2
        if (found := kept(middle)) is not None:
            best, low = found, middle
        else:
            high = middle
    return best


def _mean_error(problem: Problem, solution: Solution) -> float:
    """Mean over the layers of the relative output error."""
    total = 0.0
    for layer, solved in zip(problem.layers, solution.layers, strict=True):
        copies, experts = solved.choice.copies, slot_experts(solved.choice.copies)
        total += float((layer.error[experts, solved.choice.format] / copies[experts]).sum())
    return total / len(problem.layers)
