"""The best solution within a limit on the error: option ``max_error`` of policy ``optimal``.

On a target that does not wait, the goal is the fewest bytes. The least error falls as the budget grows, so the smallest
budget whose least error is within the limit is found by bisection, to the byte.

On a target that waits, balance is reduced. Two families of problems lead from the unlimited optimum to the least error. *Easing*
raises the imbalance that costs nothing, equally in all layers. *Weighing* multiplies the error (Lagrangian relaxation); it finds
only the convex hull of the possible solutions, but also bounds the optimum. Both are bisected, and every solution on the way that
is within the limit is a candidate. Candidates are compared by the objective that ``policies.optimal`` documents, never by that
of the problem that they solve.
"""

from collections.abc import Callable
from dataclasses import replace
from math import gcd

from rq_compile.planning.problem import Problem
from rq_compile.planning.solver import Objective, Solution, objective_of

Solve = Callable[[Problem, Objective, int], Solution | None]
HALVINGS = 12
# The last weighted problem counts the error 2 ** 40 times, so that only the error matters.
DOUBLINGS = 40


def fewest_bytes(solve: Solve, problem: Problem, objective: Objective, max_error: float) -> Solution | None:
    """The solution with the fewest bytes whose mean error per layer is at most ``max_error``; None if none fits the budget."""

    def kept(budget: int) -> Solution | None:
        found = solve(problem, objective, budget)
        return found if found is not None and found.mean_error <= max_error else None

    best = kept(problem.budget)
    if best is None:
        return None
    sizes = [*(layer.size for layer in problem.layers), *(item.size for item in problem.dense)]
    unit = gcd(*(int(size) for some in sizes for size in some))
    # Units that are too few, and units that are enough.
    low, high = 0, best.bytes // unit
    while high - low > 1:
        middle = (low + high) // 2
        if (found := kept(middle * unit)) is None:
            low = middle
        else:
            best, high = found, min(middle, found.bytes // unit)
    return best


def least_objective(solve: Solve, problem: Problem, objective: Objective, max_error: float) -> Solution | None:
    """The solution with the least ``objective`` found whose mean error per layer is at most ``max_error``, with its bound."""
    free = solve(problem, objective, problem.budget)
    if free is None or free.mean_error <= max_error:
        return free
    candidates: list[Solution] = []
    bound = free.bound

    def kept(found: Solution | None) -> bool:
        if found is None or found.mean_error > max_error:
            return False
        candidates.append(replace(found, value=objective_of(problem, objective, found.layers, found.dense)))
        return True

    def weighed(doublings: float) -> bool:
        nonlocal bound
        weight = 2.0**doublings
        layers = tuple(replace(layer, error=layer.error * (1 + weight)) for layer in problem.layers)
        whole = problem.whole and replace(problem.whole, modules=tuple(item.scaled(1 + weight) for item in problem.dense))
        found = solve(replace(problem, layers=layers, whole=whole), objective, problem.budget)
        if found is None:
            return False
        # Any plan within the limit pays at most this much for the weight.
        bound = max(bound, found.bound - weight * max_error * problem.summed_layers)
        return kept(replace(found, mean_error=found.mean_error / (1 + weight)))

    def eased(part: float) -> bool:
        worst = max(layer.experts for layer in problem.layers)
        goal = objective.goal**part * worst ** (1 - part)
        return kept(solve(problem, replace(objective, goal=goal, hedge=part * objective.hedge), problem.budget))

    _bisect(weighed, DOUBLINGS, -DOUBLINGS)
    _bisect(eased, 0.0, 1.0)
    if not candidates:
        return None
    best = min(candidates, key=lambda found: found.value)
    return replace(best, bound=min(bound, best.value))


def _bisect(kept: Callable[[float], bool], good: float, bad: float) -> None:
    """Call ``kept`` closer and closer to where its answer changes. ``good``: the point where it is true if it is true
    anywhere."""
    if not kept(good):
        return
    for _ in range(HALVINGS):
        middle = (good + bad) / 2
        if kept(middle):
            good = middle
        else:
            bad = middle
