"""Policy ``optimal``: copies, formats and ranks of all layers together, for the least predicted cost within the budget.

The objective, summed over the layers (weights are options; loads are those of the worst calibration text, see ``worst_text``):

    error  +  balance * max(0, imbalance - 1 - tolerance)  +  hedge * max(0, drift imbalance - 1 - tolerance)

*error* is the layer's relative output error, the sum of its experts' measured errors, weighted by the layer's sensitivity
(``problem.error_weights``). *imbalance* is the load that the target waits for: the busiest slot (LIS) of a batched lowering,
or the busiest of several ranks. Ragged kernels on one rank do not wait, so the memory is spent on bits alone. With
``balance`` 1, a layer that is a tenth out of balance costs as much as an output that is off by a tenth of its energy. In
practice, every layer is therefore first balanced to the tolerance, in whatever formats that takes, and then the remaining
bytes buy bits where they reduce the error most. *drift imbalance* is the busiest slot if any one expert may gain ``drift``
mean loads, as happens on a kind of text that was not calibrated on (``demand.drift_gain``). It only counts once the texts are
balanced, and with a small weight: on four trained models (benchmarks/balance.py), ``hedge`` 0.0002 balances text of another
kind as well as 0.01, and 0.01 pays for that with int4 where int8 would fit. On one rank, a layer whose texts are out of
balance counts as if it were just balanced, plus the remaining imbalance.

A plan that balances layers that policy ``paper`` leaves unbalanced stores more experts in int8. Its error is then above that of
``paper``, which leaves most experts as they are; both errors are far too small to be visible in the perplexity. If the budget
holds replicas in the checkpoint's own format, or cold experts make room for them with less error, the objective finds this.

All copies of an expert share a format, so that an answer does not depend on the rest of the batch; ``mixed_copies`` lifts this.
``max_error`` limits the mean error of a layer. If it cannot be kept otherwise, balance is reduced (``max_error``). On a target
that does not wait, the plan with ``max_error`` takes the fewest bytes within the limit, because bytes are the cost of a step. It
then states no objective.

With several ranks, every layer gets the same number of slots and every rank an equal share of them, as serving systems require.
A replica on a second rank is one more expert that a small batch reads. Where the costs of ranks were measured (``cpu``), the plan
therefore has the best number of copies that pays, compared with the best placement without copies. Two steps are predicted: a
calibration batch, as in prefill, and one token of each of its sequences, as in decoding. Copies pay if the batch gains more than
the other step loses, which may be at most ``MOST_LOST``. With option ``tokens``, only a step of so many tokens counts.

If experts were measured in ``constant`` and the target waits, a first solution says which experts are constant. The others are
then balanced anew, because constant experts have no load. Such a plan states no objective.
The bound in the plan proves how close the plan is to the optimum. For one rank, the optimum is usually reached (``allocation``,
``exact``); for several, the packing leaves a gap (``rank_solver``).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.planning.allocation import slot_experts
from rq_compile.planning.budget import over_budget
from rq_compile.planning.few_bits import check_stored, or_fewer_bits, or_measure
from rq_compile.planning.fewest_reads import fewest_reads
from rq_compile.planning.knapsack import smallest_formats
from rq_compile.planning.max_error import fewest_bytes, least_objective
from rq_compile.planning.metrics import slot_loads
from rq_compile.planning.problem import Decision, Layer, Problem
from rq_compile.planning.rank_solver import solve_on_ranks
from rq_compile.planning.schema import Optimality, Slot
from rq_compile.planning.solver import ROUNDING, Objective, Solution, solve_on_one_rank
from rq_compile.quantization.formats import FLOAT_FORMATS, SLOT_FORMATS, Format

# What decoding may lose by copies of experts: less than the noise of its time.
MOST_LOST = 0.01

Weight = Annotated[float, Field(ge=0, le=1e6)]
# Relative rounding of a sum of errors in another order: the error that a plan states can be given as max_error.
SUMMATION = 1e-9


class Options(Document):
    """``formats``: the only formats to use, separated by commas; empty means all measured ones. ``max_error``: 0 means no
    limit. ``objective``: "error", as above, or "bytes-read", see ``fewest_reads``."""

    tolerance: Weight = 0.01
    balance: Weight = 1.0
    drift: Weight = 1.0
    hedge: Weight = 0.0002
    max_error: Weight = 0.0
    mixed_copies: bool = False
    formats: str = ""
    objective: Literal["error", "bytes-read"] = "error"


def decide(problem: Problem, options: Options) -> Decision:
    """
    Raises:
        UserError: the budget does not hold every expert once, ``max_error`` cannot be kept, or ``formats`` names a format that
            was not measured.
    """
    _check_objective(problem, options)
    allowed = _allowed_formats(problem, options.formats)
    if problem.whole is None and (least := _least_bytes(_with_formats(problem, allowed))) > problem.budget:
        who, alternative = "one slot per expert in its smallest format", or_fewer_bits(problem, least - problem.budget)
        raise over_budget(least, problem.memory, problem.bytes_before, who, alternative=alternative)
    solutions = [_solution(_with_formats(problem, formats), options) for formats in _float_choices(allowed)]
    found = [solution for solution in solutions if solution is not None and np.isfinite(solution.value)]
    if not found:
        within = f"--engine-bytes {problem.whole.engine_bytes}" if problem.whole else f"--memory {problem.memory:g}"
        limited = "the sum of all errors" if problem.whole else "the mean error of a layer"
        raise UserError(f"no plan within {within} keeps {limited} below max_error {options.max_error:g}; raise one of the two")
    if options.max_error and problem.cost.busiest == "nothing" and options.objective == "error":
        fewest = min(found, key=lambda solution: (solution.bytes, solution.mean_error))
        return Decision(_slots(problem, fewest), dense=fewest.dense)
    best = min(found, key=lambda solution: solution.value)
    bound: float | None = min(solution.bound for solution in found)
    if problem.cost.busiest != "nothing" and any(map(np.any, _constant_experts(problem, best))):
        bound = None
        problem, best = _balanced_without_constants(problem, options, allowed, best)
    copied, best = best, _with_copies_that_pay(problem, options, allowed, best)
    said = [] if best is copied else [_not_paying(problem, copied, best)]
    said += _unbalanced(problem, best, options)
    optimality = None if bound is None else Optimality(objective=best.value, bound=bound)
    return Decision(_slots(problem, best), optimality, said, best.dense)


def _constant_experts(problem: Problem, solution: Solution) -> list[np.ndarray]:
    """Which experts of every layer have a slot in ``constant``, bool ``[m]``."""
    found = []
    for layer, solved in zip(problem.layers, solution.layers, strict=True):
        experts = slot_experts(solved.choice.copies)
        computed = np.array([SLOT_FORMATS[format].computed for format in layer.formats])
        found.append(np.isin(np.arange(layer.experts), experts[~computed[solved.choice.format]]))
    return found


def _balanced_without_constants(
    problem: Problem, options: Options, allowed: list[Format], first: Solution
) -> tuple[Problem, Solution]:
    """The problem with the constant experts of ``first``, which have no load, and its best solution, or ``first`` if it has
    none."""
    constant = _constant_experts(problem, first)
    layers = tuple(layer.with_constants(mine) for layer, mine in zip(problem.layers, constant, strict=True))
    fixed = replace(problem, layers=layers)
    solutions = [_solution(_with_formats(fixed, formats), options) for formats in _float_choices(allowed)]
    found = [solution for solution in solutions if solution is not None and np.isfinite(solution.value)]
    return fixed, min(found, key=lambda solution: solution.value, default=first)


def _with_copies_that_pay(problem: Problem, options: Options, allowed: list[Format], best: Solution) -> Solution:
    """``best``, or the best solution with fewer replicas that pay; they may be none."""
    even = all(layer.experts % problem.ranks == 0 for layer in problem.layers)
    if not (_replicas(problem, best) and even and problem.cost.exchange_known) or options.max_error:
        return best

    def solved(most: int, accepted: Callable[[Solution], bool]) -> Solution | None:
        objective, choices = _objective(options), _float_choices(allowed)
        solutions = [
            solve_on_ranks(_with_formats(problem, formats), objective, problem.budget, most_replicas=most, accepted=accepted)
            for formats in choices
        ]
        found = [solution for solution in solutions if solution is not None and np.isfinite(solution.value)]
        return min(found, key=lambda solution: solution.value, default=None)

    placed = solved(0, lambda solution: True)
    if placed is None:
        return best
    times = _step_times(problem, placed)

    def pays(solution: Solution) -> bool:
        ratios = _step_times(problem, solution) / times
        return bool(ratios[0] < 1 and np.prod(ratios) < 1 and ratios.max() <= 1 + MOST_LOST)

    if pays(best):
        return best
    return solved(_replicas(problem, best) - 1, pays) or placed


def _replicas(problem: Problem, solution: Solution) -> int:
    """Replicas of a layer; on several ranks, all layers have as many."""
    return len(solution.layers[0].ranks) - problem.layers[0].experts


def _step_times(problem: Problem, solution: Solution) -> np.ndarray:
    """Predicted seconds of every step of the problem, float ``[steps]``."""
    times = np.zeros(len(problem.steps))
    for layer, slots in zip(problem.layers, _slots(problem, solution), strict=True):
        rows, lanes = slot_loads(np.asarray(layer.calibration.load), [slot.expert for slot in slots]), np.zeros(len(slots))
        times += [problem.cost.step_time(layer.geometry, slots, rows, tokens, lanes) for tokens in problem.steps]
    return times


def _not_paying(problem: Problem, copied: Solution, chosen: Solution) -> str:
    """Why the plan does not have the copies of ``copied``."""
    ratios, replicas = _step_times(problem, copied) / _step_times(problem, chosen), _replicas(problem, chosen)
    more, has = ("More replicas", f"has {replicas} in a layer") if replicas else ("Replicas", "places experts and copies none")
    if ratios[0] >= 1:
        return (
            f"{more} would not shorten a step of {problem.tokens} tokens on these ranks, so this plan {has}; --option tokens "
            "plans for steps of another size."
        )
    return (
        f"With {_replicas(problem, copied)} replicas in a layer, a step of {problem.tokens} tokens would take {ratios[0]:.2f} "
        f"times as long on these ranks, but one of {problem.steps[-1]} tokens {ratios[-1]:.2f} times, so this plan {has}; "
        f"--option tokens={problem.tokens} plans for the large step alone."
    )


def _slots(problem: Problem, solution: Solution) -> list[list[Slot]]:
    """The slots, rank by rank; within a rank, first copies come before second copies."""
    layers = []
    for layer, solved in zip(problem.layers, solution.layers, strict=True):
        experts, format, ranks = slot_experts(solved.choice.copies), solved.choice.format, solved.ranks
        order = np.argsort(ranks, kind="stable")
        slots = [Slot(expert=int(experts[s]), format=layer.formats[format[s]], rank=int(ranks[s])) for s in order]
        constant = {slot.expert: slot for slot in slots if not slot.computed}
        layers.append([slot for slot in slots if constant.get(slot.expert, slot) is slot])  # which need no copies
    return layers


def _unbalanced(problem: Problem, solution: Solution, options: Options) -> list[str]:
    if problem.cost.busiest == "nothing":
        return []
    missed = sum(layer.imbalance > 1 + options.tolerance + ROUNDING for layer in solution.layers)
    if not missed:
        return []
    way_out = "more --memory or a larger max_error" if options.max_error else "more --memory"
    return [
        f"In {missed} of {len(problem.layers)} layers, some calibration text stays more than {100 * options.tolerance:g} % out "
        f"of balance; {way_out} would help."
    ]


def _allowed_formats(problem: Problem, names: str) -> list[Format]:
    """
    Raises:
        UserError: a layer has no measured errors for one of the formats.
    """
    measured = [format for format in problem.layers[0].formats if all(format in layer.formats for layer in problem.layers)]
    wanted = [name.strip() for name in names.split(",")] if names else measured
    for name in wanted:
        if name not in measured:
            check_stored(name, problem.cost.target)
            raise UserError(
                f"option formats names {name}, but the experts were measured in {', '.join(measured)}; choose among these"
                f"{or_measure(problem, name)}",
                2,
            )
    return [format for format in measured if format in wanted]


def _float_choices(allowed: list[Format]) -> list[list[Format]]:
    """``allowed`` with one float format at a time. An engine holds one, so each that is smaller than the checkpoint's own is an
    alternative to it."""
    floats = [format for format in FLOAT_FORMATS if format in allowed]
    return [[format for format in allowed if format == one or format not in floats] for one in floats or allowed[:1]]


def _with_formats(problem: Problem, allowed: list[Format]) -> Problem:
    """``problem`` with every other format made impossible."""

    def restricted(layer: Layer) -> Layer:
        error = layer.error.copy()
        error[:, [format not in allowed for format in layer.formats]] = np.inf
        return replace(layer, error=error)

    return replace(problem, layers=tuple(restricted(layer) for layer in problem.layers))


def _check_objective(problem: Problem, options: Options) -> None:
    """
    Raises:
        UserError: the fewest bytes are to be read without a limit on the error, or on a target that waits for busy experts.
    """
    if options.objective == "error":
        return
    if not options.max_error:
        raise UserError("--objective bytes-read needs the error that you accept; add for example --option max_error=0.001", 2)
    if problem.cost.busiest != "nothing":
        raise UserError(
            f"--objective bytes-read is for ragged kernels on one rank, but {problem.cost.target} with {problem.ranks} "
            f"rank{'s' if problem.ranks > 1 else ''} waits for the busiest {problem.cost.busiest}; leave --objective out",
            2,
        )


def least_bytes(problem: Problem, options: Options) -> int:
    """Bytes of every expert once and of every module, each in its smallest format.

    Raises:
        UserError: ``formats`` names a format that was not measured, or an expert has no format.
    """
    return _least_bytes(_with_formats(problem, _allowed_formats(problem, options.formats)))


def _least_bytes(problem: Problem) -> int:
    least = sum(int(item.size.min()) for item in problem.dense)
    for layer in problem.layers:
        possible = np.isfinite(layer.error).any(axis=1)
        if not possible.all():
            index = layer.calibration.index
            raise UserError(f"expert {possible.argmin()} of layer {index} fits no format; allow more with --option formats", 2)
        least += int(layer.size[smallest_formats(layer.error, layer.size[None])].sum())
    return least


def _objective(options: Options) -> Objective:
    return Objective(1 + options.tolerance, options.balance, options.drift, options.hedge, options.mixed_copies)


def _solution(problem: Problem, options: Options) -> Solution | None:
    """The best solution within ``max_error``; None if there is none."""
    limit = options.max_error * (1 + SUMMATION)
    if options.objective == "bytes-read":
        return fewest_reads(problem, limit)
    objective = _objective(options)
    solve = solve_on_ranks if problem.ranks > 1 else solve_on_one_rank
    if not options.max_error:
        return solve(problem, objective, problem.budget)
    bounded = fewest_bytes if problem.cost.busiest == "nothing" else least_objective
    return bounded(solve, problem, objective, limit)
