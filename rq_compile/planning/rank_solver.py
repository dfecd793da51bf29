"""Minimise error and imbalance under a budget on several ranks, with the same number of slots in every layer and on every rank.

For each number of slots, the experts that would be busiest under drift are copied, and their formats are solved as a knapsack.
The slots are then packed on the ranks, with other experts copied instead if that balances better. Numbers of slots are tried in
the order of their cost with perfectly even packing, until the next number cannot be better.

The bound holds for any copies, formats and packing. The busiest rank is at least as busy as the mean, and as the busiest slot.
With N replicas in a layer, the drift imbalance is not better than after some k <= N replicas of the busiest-first sequence, which
then has no more copies of any expert (``copies.copy_sequence``). Each of the N - k other replicas costs at least as much as the
cheapest further copy of any expert. For a given price per byte, this is a sum over experts, which bounds the optimum as in
``allocation``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rq_compile.planning.allocation import Allocation, LayerChoices, allocate_copies, slot_experts
from rq_compile.planning.copies import CopySequence, copy_sequence, sequence_of
from rq_compile.planning.exact import polished
from rq_compile.planning.metrics import copy_numbers
from rq_compile.planning.placement import copied_anew, imbalance, pack
from rq_compile.planning.problem import Layer, Problem
from rq_compile.planning.solver import ROUNDING, LayerSolution, Objective, Solution, solution_of, split_dense


@dataclass(frozen=True)
class _LayerSequence:
    """``choices`` copies the busiest experts first, including drift, with the penalty of drift alone.

    ``missed [n + 1]``: the least cost of imbalance that any choice of this number of replicas can have.
    """

    layer: Layer
    choices: LayerChoices
    missed: np.ndarray


def solve_on_ranks(
    problem: Problem,
    objective: Objective,
    budget: int,
    *,
    most_replicas: int | None = None,
    accepted: Callable[[Solution], bool] = lambda solution: True,
) -> Solution | None:
    """The solution with the least objective found within ``budget`` bytes; None if there is none.

    Without more restrictions there is one if the budget holds every expert once. ``most_replicas``: of a layer. ``accepted``:
    whether a solution may be taken. The bound is that of all solutions nevertheless.
    """
    sequences = _sequences(problem, objective)
    choices = [sequence.choices for sequence in sequences]
    most = min(len(choice.sequence.expert) for choice in choices)
    even = [n for n in range(most + 1) if all((layer.experts + n) % problem.ranks == 0 for layer in problem.layers)]
    # If no even number of slots exists or fits, some ranks hold one slot more than others.
    dense = [item.choices for item in problem.dense]
    relaxed = _relaxed(choices, dense, even, budget) or _relaxed(choices, dense, [0], budget)
    least = {number: sum(float(sequence.missed[number]) for sequence in sequences) for number in relaxed}
    best: Solution | None = None
    bound = np.inf
    for number, allocation in relaxed.items():
        # Any price bounds the optimum. The price of the formats is good if the copies are; a price of 0 is if memory is plenty.
        dual = max(_bound(choices, dense, number, problem.ranks, price, budget) for price in (allocation.price, 0.0))
        bound = min(bound, least[number] + dual)
    tried = [number for number in relaxed if most_replicas is None or number <= most_replicas]
    for number in sorted(tried, key=lambda number: relaxed[number].value + least[number]):
        if best is not None and relaxed[number].bound + least[number] >= best.value:
            break
        for solution in _packed(problem, sequences, relaxed[number], objective, budget):
            if (best is None or solution.value < best.value) and accepted(solution):
                best = solution
    return None if best is None else replace(best, bound=min(bound, best.value))


def _sequences(problem: Problem, objective: Objective) -> list[_LayerSequence]:
    """Sequences that are long enough for the drift imbalance to reach its goal in every layer."""

    def copied(load: np.ndarray, replicas: int | None = None) -> CopySequence:
        return copy_sequence(
            load, goal=objective.goal + ROUNDING, gain=np.zeros_like(load), most_copies=problem.ranks, replicas=replicas
        )

    calm = [layer.worst_demand() for layer in problem.layers]
    drifted = [load + layer.drift_gain(objective.drift) for load, layer in zip(calm, problem.layers, strict=True)]
    longest = max(len(copied(load).expert) for load in drifted) + problem.ranks
    found = []
    for layer, load, drifted_load in zip(problem.layers, calm, drifted, strict=True):
        sequence = copied(drifted_load, longest)
        least_busy = np.maximum(1.0, copied(load, longest).level * problem.ranks / layer.experts)
        choices = LayerChoices(sequence, objective.exposed(sequence.level), layer.error, layer.size, objective.mixed_copies)
        found.append(_LayerSequence(layer, choices, objective.missed(least_busy)))
    return found


def _relaxed(choices: list[LayerChoices], dense: list[LayerChoices], numbers: list[int], budget: int) -> dict[int, Allocation]:
    """The best formats for the copies of the busiest experts, by number of replicas, without the cost of imbalance."""
    everything = [*choices, *dense]
    found = {number: allocate_copies(everything, [number] * len(choices) + [0] * len(dense), budget) for number in numbers}
    return {number: allocation for number, allocation in found.items() if allocation is not None}


def _bound(choices: list[LayerChoices], dense: list[LayerChoices], number: int, ranks: int, price: float, budget: int) -> float:
    """A lower bound of error and cost of drift within ``budget``, for any copies with ``number`` replicas in every layer."""
    total = sum(float(module.priced(price)[0]) for module in dense) - price * budget
    for layer in choices:
        within = layer.priced(price)[: number + 1]
        # The cost of an expert is concave in its copies: the last possible copy, on the last rank, is the cheapest.
        last, before = ((layer.error + price * copies * layer.size).min(axis=1) for copies in (ranks, ranks - 1))
        cheapest = float((last - before).min())
        total += float((within + np.arange(number, -1, -1) * cheapest).min())
    return total


def _packed(
    problem: Problem, sequences: list[_LayerSequence], allocation: Allocation, objective: Objective, budget: int
) -> list[Solution]:
    """The copies of ``allocation`` on ranks. In layers that stay out of balance, other experts are copied instead."""
    packed = [
        pack(sequence.layer.demand, chosen.copies, problem.ranks, objective.goal)
        for sequence, chosen in zip(sequences, split_dense(problem, allocation.layers)[0], strict=True)
    ]
    anew = [copied_anew(sequence.layer.demand, holds, objective.goal) for sequence, holds in zip(sequences, packed, strict=True)]
    found = [_with_formats(problem, sequences, placed, objective, budget) for placed in (packed, anew)]
    return [solution for solution in found if solution is not None]


def _with_formats(
    problem: Problem, sequences: list[_LayerSequence], placed: list[np.ndarray], objective: Objective, budget: int
) -> Solution | None:
    """The best formats for experts on ranks, ``placed[l]`` bool ``[R, m]``."""
    choices, imbalances = [], []
    for sequence, holds in zip(sequences, placed, strict=True):
        layer, copies = sequence.layer, holds.sum(axis=0)
        load = layer.worst_demand()
        imbalances.append(imbalance(layer.demand, holds))
        exposed = float(((load + layer.drift_gain(objective.drift)) / copies).max())
        cost = float(objective.missed(imbalances[-1]) + objective.exposed(exposed))
        fixed = sequence_of(copies)
        penalty = np.full(len(fixed.expert) + 1, cost)
        choices.append(LayerChoices(fixed, penalty, layer.error, layer.size, objective.mixed_copies))
    choices += [item.choices for item in problem.dense]
    replicas = [len(choice.sequence.expert) for choice in choices]
    allocation = allocate_copies(choices, replicas, budget)
    if allocation is None:
        return None
    allocation = polished(choices, [[number] for number in replicas], allocation, budget)
    of_layers, dense = split_dense(problem, allocation.layers)
    layers = [
        LayerSolution(chosen, _ranks_of_slots(holds), value)
        for chosen, holds, value in zip(of_layers, placed, imbalances, strict=True)
    ]
    return solution_of(problem, layers, dense, allocation.value, allocation.bound)


def _ranks_of_slots(holds: np.ndarray) -> np.ndarray:
    """int64 ``[S]``, with slots in the order of ``slot_experts``: an expert's n-th copy is on the n-th of its ranks."""
    of_expert = [np.flatnonzero(held) for held in holds.T]
    experts = slot_experts(holds.sum(axis=0))
    number, _ = copy_numbers(experts)
    return np.array([of_expert[expert][copy] for expert, copy in zip(experts, number, strict=True)], np.int64)
