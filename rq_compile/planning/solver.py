"""Minimise error and imbalance under a budget, on one rank or several: the search behind policy ``optimal``."""

from dataclasses import dataclass, replace

import numpy as np

from rq_compile.planning.allocation import Allocation, LayerChoices, allocate, allocate_copies, slot_experts
from rq_compile.planning.copies import CopySequence, copy_sequence
from rq_compile.planning.demand import drift_gain
from rq_compile.planning.metrics import rank_imbalance, rank_loads
from rq_compile.planning.placement import pack
from rq_compile.planning.problem import Layer, Problem

# Loads are sums of rounded fractions; a slot is not above its goal for that.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Objective:
    """What is minimised; ``policies.optimal`` says what it means. ``goal`` is 1 + tolerance."""

    goal: float
    balance: float
    drift: float
    hedge: float
    mixed_copies: bool

    def penalty(self, imbalance: np.ndarray, drift_imbalance: np.ndarray) -> np.ndarray:
        missed, exposed = np.maximum(0.0, imbalance - self.goal), np.maximum(0.0, drift_imbalance - self.goal)
        return self.balance * missed + self.hedge * exposed


@dataclass(frozen=True)
class Solution:
    """``ranks[l]`` int64 ``[S]``: where the slots of ``allocation.layers[l]`` stand."""

    allocation: Allocation
    ranks: list[np.ndarray]


def solve(problem: Problem, objective: Objective, budget: int) -> Solution | None:
    """The least objective within ``budget`` bytes, with its bound; None if the budget does not hold every expert once."""
    if problem.cost.busiest == "rank":
        return _solve_on_ranks(problem, objective, budget)
    most_copies = None
    if problem.cost.busiest == "nothing":
        objective, most_copies = replace(objective, balance=0.0, hedge=0.0), 1
    choices = [_choices(layer, objective, _sequence(layer, objective, most_copies), 1.0) for layer in problem.layers]
    allocation = allocate(choices, budget)
    if allocation is None:
        return None
    return Solution(allocation, [np.zeros(len(choice.format), np.int64) for choice in allocation.layers])


def _sequence(layer: Layer, objective: Objective, most_copies: int | None, replicas: int | None = None) -> CopySequence:
    load = layer.worst_demand()
    return copy_sequence(
        load,
        goal=objective.goal + ROUNDING,
        gain=drift_gain(load, objective.drift),
        most_copies=most_copies or layer.experts * len(layer.demand),
        replicas=replicas,
    )


def _choices(layer: Layer, objective: Objective, sequence: CopySequence, share: float) -> LayerChoices:
    """``share``: what a slot with the mean load of an expert is of the mean load of whatever the target waits for."""
    penalty = objective.penalty(np.maximum(1.0, share * sequence.level), sequence.drift_level)
    return LayerChoices(sequence, penalty, layer.error, layer.size, objective.mixed_copies)


def _solve_on_ranks(problem: Problem, objective: Objective, budget: int) -> Solution | None:
    """The same number of slots in every layer and on every rank.

    For each number of replicas the formats are solved with the least penalty that any packing could have; then, lowest bound
    first, the slots are packed, until no other number can undercut the best.
    """
    layers, ranks = problem.layers, problem.ranks
    longest = max(len(_sequence(layer, objective, ranks).expert) for layer in layers) + ranks
    choices = [_choices(layer, objective, _sequence(layer, objective, ranks, longest), ranks / layer.experts) for layer in layers]
    most = min(len(choice.sequence.expert) for choice in choices)
    even = [number for number in range(most + 1) if all((layer.experts + number) % ranks == 0 for layer in layers)]
    # Where no even number of slots exists or fits, some ranks hold one slot more than others.
    relaxed = _relaxed(choices, even, budget) or _relaxed(choices, [0], budget)
    best: Solution | None = None
    for number, allocation in sorted(relaxed.items(), key=lambda found: (found[1].bound, found[0])):
        if best is not None and allocation.bound >= best.allocation.value:
            break
        packed = _packed(problem, objective, choices, allocation, number)
        if best is None or packed.allocation.value < best.allocation.value:
            best = packed
    if best is None:
        return None
    bound = min(allocation.bound for allocation in relaxed.values())
    return Solution(replace(best.allocation, bound=min(bound, best.allocation.value)), best.ranks)


def _relaxed(choices: list[LayerChoices], numbers: list[int], budget: int) -> dict[int, Allocation]:
    found = {number: allocate_copies(choices, [number] * len(choices), budget) for number in numbers}
    return {number: allocation for number, allocation in found.items() if allocation is not None}


def _packed(problem: Problem, objective: Objective, choices: list[LayerChoices], allocation: Allocation, number: int) -> Solution:
    """``allocation`` on ranks, with the penalty of the packing in place of the least possible one."""
    ranks, value = [], allocation.value
    for layer, choice, chosen in zip(problem.layers, choices, allocation.layers, strict=True):
        experts = slot_experts(chosen.copies)
        load = (layer.demand / chosen.copies)[:, experts]
        placed = pack(load, experts, problem.ranks, objective.goal)
        imbalance = rank_imbalance(rank_loads(load, placed.tolist(), problem.ranks)).max()
        drift = choice.sequence.drift_level[number]
        value += float(objective.penalty(imbalance, drift) - choice.penalty[number])
        ranks.append(placed)
    return Solution(replace(allocation, value=value), ranks)
