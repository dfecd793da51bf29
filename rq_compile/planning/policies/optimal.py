"""Policy ``optimal``: copies, formats and ranks of all layers together."""

import numpy as np
from pydantic import Field

from rq_compile.files import Document
from rq_compile.planning.allocation import LayerChoice, LayerChoices, allocate
from rq_compile.planning.copies import copy_sequence
from rq_compile.planning.placement import pack
from rq_compile.planning.problem import Decision, Layer, Problem
from rq_compile.planning.schema import Optimality, Slot


class Options(Document):
    tolerance: float = Field(default=0.01, ge=0)
    balance: float = Field(default=1.0, ge=0)


def decide(problem: Problem, options: Options) -> Decision:
    choices = [_choices(layer, problem, options) for layer in problem.layers]
    allocation = allocate(choices, problem.budget)
    assert allocation is not None  # the budget was checked against the smallest formats
    slots = [_slots(layer, choice, problem) for layer, choice in zip(problem.layers, allocation.layers, strict=True)]
    return Decision(slots, Optimality(objective=allocation.value, bound=allocation.bound))


def _choices(layer: Layer, problem: Problem, options: Options) -> LayerChoices:
    load = layer.worst_demand()
    goal = 1 + options.tolerance
    if problem.cost.busiest == "nothing":
        sequence = copy_sequence(load, most_copies=1, replicas=0)
        penalty = np.zeros(1)
    else:
        most = problem.ranks if problem.cost.busiest == "rank" else layer.experts
        sequence = copy_sequence(load, most_copies=most, replicas=3 * layer.experts, until=goal)
        penalty = options.balance * np.maximum(0.0, sequence.level - goal)
    return LayerChoices(sequence, penalty, layer.error, layer.size)


def _slots(layer: Layer, choice: LayerChoice, problem: Problem) -> list[Slot]:
    experts = np.concatenate(
        [np.arange(layer.experts), *(np.flatnonzero(choice.copies > n) for n in range(1, choice.copies.max()))]
    )
    ranks = np.zeros(len(experts), np.int64)
    if problem.ranks > 1:
        ranks = pack((layer.demand / choice.copies)[:, experts], experts, problem.ranks)
    order = np.argsort(ranks, kind="stable")
    return [Slot(expert=int(experts[s]), format=layer.formats[choice.format[experts[s]]], rank=int(ranks[s])) for s in order]
