"""Minimise error and imbalance under a budget: the question of policy ``optimal``, and its answer for one rank."""

from dataclasses import dataclass, replace

import numpy as np

from rq_compile.planning.allocation import LayerChoice, LayerChoices, allocate
from rq_compile.planning.copies import copy_sequence
from rq_compile.planning.exact import polished
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

    def missed(self, imbalance: np.ndarray | float) -> np.ndarray:
        """What an imbalance on the calibration texts costs."""
        return self.balance * np.maximum(0.0, imbalance - self.goal)

    def exposed(self, drift_imbalance: np.ndarray | float) -> np.ndarray:
        """What it costs that text of another kind could be as much out of balance."""
        return self.hedge * np.maximum(0.0, drift_imbalance - self.goal)


@dataclass(frozen=True)
class LayerSolution:
    """``choice`` with the rank of every slot, int64 ``[S]``.

    ``imbalance``: busiest slot or rank in the text that is served worst, over the mean.
    """

    choice: LayerChoice
    ranks: np.ndarray
    imbalance: float


@dataclass(frozen=True)
class Solution:
    """``value`` is the objective of ``layers``, ``bound`` what nothing within the budget can undercut."""

    layers: list[LayerSolution]
    value: float
    bound: float


def solve_on_one_rank(problem: Problem, objective: Objective, budget: int) -> Solution | None:
    """The least objective within ``budget`` bytes; None if the budget does not hold every expert once."""
    replicates = problem.cost.busiest == "slot"
    if not replicates:
        objective = replace(objective, balance=0.0, hedge=0.0)
    choices = [_choices(layer, objective, replicates) for layer in problem.layers]
    allocation = allocate(choices, budget)
    if allocation is None:
        return None
    allocation = polished(choices, [list(range(len(choice.penalty))) for choice in choices], allocation, budget)
    layers = [
        LayerSolution(chosen, np.zeros(len(chosen.format), np.int64), float((layer.worst_demand() / chosen.copies).max()))
        for layer, chosen in zip(problem.layers, allocation.layers, strict=True)
    ]
    return Solution(layers, allocation.value, allocation.bound)


def _choices(layer: Layer, objective: Objective, replicates: bool) -> LayerChoices:
    load = layer.worst_demand()
    # No expert's worst load is above m, so m copies are always enough.
    most_copies = layer.experts if replicates else 1
    gain = layer.drift_gain(objective.drift)
    sequence = copy_sequence(load, goal=objective.goal + ROUNDING, gain=gain, most_copies=2 * most_copies - 1)
    penalty = objective.missed(sequence.level) + objective.exposed(sequence.drift_level)
    return LayerChoices(sequence, penalty, layer.error, layer.size, objective.mixed_copies)
