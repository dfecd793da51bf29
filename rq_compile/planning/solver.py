"""Minimise error and imbalance under a budget: the problem of policy ``optimal``, and its solution for one rank."""

from dataclasses import dataclass, replace

import numpy as np

from rq_compile.planning.allocation import LayerChoice, LayerChoices, allocate, slot_experts
from rq_compile.planning.copies import CopySequence, copy_sequence
from rq_compile.planning.exact import polished
from rq_compile.planning.problem import Layer, Problem

# Loads are sums of rounded fractions; a slot is not above its goal for that.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Objective:
    """The weights of the objective, which ``policies.optimal`` explains. ``goal`` is 1 + tolerance."""

    goal: float
    balance: float
    drift: float
    hedge: float
    mixed_copies: bool

    def missed(self, imbalance: np.ndarray | float) -> np.ndarray:
        """The cost of an imbalance on the calibration texts."""
        return self.balance * np.maximum(0.0, imbalance - self.goal)

    def exposed(self, drift_imbalance: np.ndarray | float) -> np.ndarray:
        """The cost of a possible imbalance on text of another kind."""
        return self.hedge * np.maximum(0.0, drift_imbalance - self.goal)


@dataclass(frozen=True)
class LayerSolution:
    """``choice`` with the rank of every slot, int64 ``[S]``.

    ``imbalance``: busiest slot or rank in the text that is served worst, divided by the mean.
    """

    choice: LayerChoice
    ranks: np.ndarray
    imbalance: float


@dataclass(frozen=True)
class Solution:
    """``value``: the objective of ``layers``. ``bound``: a lower bound of the objective of all solutions within the budget.

    ``mean_error``: relative error of a layer's output, as a mean over the layers; in a plan of the whole model, the sum of all
    errors. ``bytes``: bytes of all slots and planned modules. ``dense``: the formats of these modules.
    """

    layers: list[LayerSolution]
    value: float
    bound: float
    mean_error: float
    bytes: int
    dense: list[int]


def solution_of(problem: Problem, layers: list[LayerSolution], dense: list[int], value: float, bound: float) -> Solution:
    error = sum(error_of(layer, solved) for layer, solved in zip(problem.layers, layers, strict=True))
    size = sum(int(layer.size[solved.choice.format].sum()) for layer, solved in zip(problem.layers, layers, strict=True))
    if problem.whole:
        error, size = error + problem.whole.error_of(dense), size + problem.whole.bytes_of(dense)
    return Solution(layers, value, bound, error / problem.summed_layers, size, dense)


def split_dense(problem: Problem, chosen: list[LayerChoice]) -> tuple[list[LayerChoice], list[int]]:
    """The choices of the layers, and the formats of the non-expert modules after them."""
    count = len(problem.layers)
    return chosen[:count], [int(choice.format[0]) for choice in chosen[count:]]


def error_of(layer: Layer, solved: LayerSolution) -> float:
    """Relative output error of one layer: the sum over its experts, each averaged over its copies."""
    copies, experts = solved.choice.copies, slot_experts(solved.choice.copies)
    return float((layer.error[experts, solved.choice.format] / copies[experts]).sum())


def objective_of(problem: Problem, objective: Objective, layers: list[LayerSolution], dense: list[int]) -> float:
    """``objective`` of a solution, whichever problem it was found for."""
    total = problem.whole.error_of(dense) if problem.whole else 0.0
    for layer, solved in zip(problem.layers, layers, strict=True):
        total += error_of(layer, solved)
        if problem.cost.busiest != "nothing":
            drifted = drift_imbalance(problem, layer, objective, solved)
            total += float(objective.missed(solved.imbalance) + objective.exposed(drifted))
    return total


def drift_imbalance(problem: Problem, layer: Layer, objective: Objective, solved: LayerSolution) -> float:
    """Load of the busiest slot if any one expert gains as much as drift allows.

    On one rank, drift only counts once the texts are balanced. Before that, the drift imbalance is that of the layer when it is
    just balanced, plus the remaining imbalance of the texts.
    """
    load = layer.worst_demand()
    gain = layer.drift_gain(objective.drift)
    if problem.cost.busiest == "slot" and solved.imbalance > objective.goal + ROUNDING:
        sequence = _sequence(layer, objective, layer.experts)
        balanced = sequence.balanced
        return float(solved.imbalance - sequence.level[balanced] + sequence.drift_level[balanced])
    return float(((load + gain) / solved.choice.copies).max())


def solve_on_one_rank(problem: Problem, objective: Objective, budget: int) -> Solution | None:
    """The solution with the least objective within ``budget`` bytes; None if the budget does not hold every expert once."""
    replicates = problem.cost.busiest == "slot"
    if not replicates:
        objective = replace(objective, balance=0.0, hedge=0.0)
    choices = [_choices(layer, objective, replicates) for layer in problem.layers]
    choices += [item.choices for item in problem.dense]
    allocation = allocate(choices, budget)
    if allocation is None:
        return None
    allocation = polished(choices, [list(range(len(choice.penalty))) for choice in choices], allocation, budget)
    of_layers, dense = split_dense(problem, allocation.layers)
    layers = [
        LayerSolution(chosen, np.zeros(len(chosen.format), np.int64), float((layer.worst_demand() / chosen.copies).max()))
        for layer, chosen in zip(problem.layers, of_layers, strict=True)
    ]
    return solution_of(problem, layers, dense, allocation.value, allocation.bound)


def _choices(layer: Layer, objective: Objective, replicates: bool) -> LayerChoices:
    # No expert's worst load is above m, so m copies are always enough.
    sequence = _sequence(layer, objective, layer.experts if replicates else 1)
    penalty = objective.missed(sequence.level) + objective.exposed(sequence.drift_level)
    return LayerChoices(sequence, penalty, layer.error, layer.size, objective.mixed_copies)


def _sequence(layer: Layer, objective: Objective, most_copies: int) -> CopySequence:
    return copy_sequence(
        layer.worst_demand(),
        goal=objective.goal + ROUNDING,
        gain=layer.drift_gain(objective.drift),
        most_copies=2 * most_copies - 1,
    )
