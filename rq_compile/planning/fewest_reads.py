"""The formats with which a token reads the fewest bytes, within limits on error and bytes: objective ``bytes-read``.

A token reads every non-expert matrix, one row of an embedding, and an expert with the probability that the cost model gives it.
Choosing formats for the fewest reads within a limit on the sum of errors is the knapsack of ``knapsack.choose_formats`` with
errors in place of bytes. If its solution takes more bytes than the budget, a price per byte is added to the reads (Everett 1963),
the least with which it fits; the bound without a price remains valid.
"""

import numpy as np

from rq_compile.planning.allocation import LayerChoice
from rq_compile.planning.knapsack import FormatChoice, choose_formats
from rq_compile.planning.problem import Layer, Problem
from rq_compile.planning.solver import LayerSolution, Solution, solution_of

# Errors as whole parts of the limit.
PARTS = 2**40
HALVINGS = 30


def fewest_reads(problem: Problem, max_error: float) -> Solution | None:
    """The solution without replicas; None if no formats keep ``max_error`` (see ``Solution.mean_error``) within the budget."""
    read = np.concatenate([_padded(rows, problem) for rows in _reads(problem)])
    error = np.concatenate([_padded(rows, problem) for rows in _errors(problem)])
    size = np.concatenate([_padded(rows, problem) for rows in _sizes(problem)])
    limit = max_error * problem.summed_layers
    possible = np.isfinite(read) & np.isfinite(error) & (error <= limit)
    if not possible.any(axis=1).all():
        return None
    parts = np.where(possible, np.ceil(np.where(possible, error, 0) / limit * PARTS), 0).astype(np.int64)

    def chosen(price: float) -> tuple[FormatChoice | None, int]:
        found = choose_formats(np.where(possible, read + price * np.where(possible, size, 0), np.inf), parts, PARTS)
        taken = 0 if found is None else int(size[np.arange(len(size)), found.format].sum())
        return found, taken

    best, taken = chosen(0.0)
    if best is None:
        return None
    bound = best.bound
    if taken > problem.budget:
        low, high = 0.0, 1e6
        best, taken = chosen(high)
        if best is None or taken > problem.budget:
            return None
        for _ in range(HALVINGS):
            middle = (low + high) / 2 if low else high / 1000
            found, taken = chosen(middle)
            if found is not None and taken <= problem.budget:
                best, high = found, middle
            else:
                low = middle
    formats = best.format
    value = float(read[np.arange(len(read)), formats].sum())
    layers, start = [], 0
    for layer in problem.layers:
        choice = LayerChoice(np.ones(layer.experts, np.int64), formats[start : start + layer.experts])
        layers.append(LayerSolution(choice, np.zeros(layer.experts, np.int64), float(layer.worst_demand().max())))
        start += layer.experts
    return solution_of(problem, layers, formats[start:].tolist(), value, min(bound, value))


def _padded(rows: np.ndarray, problem: Problem) -> np.ndarray:
    """``rows`` with infinite values for formats that a layer or module does not have."""
    width = max(3, *(len(layer.formats) for layer in problem.layers))
    return np.pad(np.asarray(rows, np.float64), ((0, 0), (0, width - rows.shape[1])), constant_values=np.inf)


def _reads(problem: Problem) -> list[np.ndarray]:
    return [*map(_expert_reads, problem.layers), *(item.read[None] for item in problem.dense)]


def _expert_reads(layer: Layer) -> np.ndarray:
    load = np.asarray(layer.calibration.load, np.float64)
    share = load / load.sum() if load.any() else np.full(layer.experts, 1 / layer.experts)
    return np.minimum(1, share * layer.geometry.top_k)[:, None] * layer.size


def _errors(problem: Problem) -> list[np.ndarray]:
    return [*(layer.error for layer in problem.layers), *(item.error[None] for item in problem.dense)]


def _sizes(problem: Problem) -> list[np.ndarray]:
    modules = [item.size[None] for item in problem.dense]
    return [*(np.broadcast_to(layer.size, (layer.experts, len(layer.size))) for layer in problem.layers), *modules]
