"""Formats without replicas: experts get the best formats that the budget allows, in an order of priority."""

from collections.abc import Callable, Sequence

import numpy as np

from rq_compile.planning.placement import contiguous
from rq_compile.planning.problem import Layer, Problem
from rq_compile.planning.schema import Slot
from rq_compile.quantization.formats import FLOAT_FORMATS, Format

Place = tuple[int, int]  # a layer's position, an expert


def all_experts(problem: Problem) -> list[Place]:
    return [(position, expert) for position, layer in enumerate(problem.layers) for expert in range(layer.experts)]


def formats_by_priority(problem: Problem, order: Sequence[Place]) -> list[list[Slot]]:
    """One slot per expert. All experts start in their smallest possible format. Then, format by format, experts are raised to the
    next larger one in ``order``, as long as the budget allows it.

    A layer's slots share one float format. If an fp32 checkpoint leaves a choice, the one with the least total error is taken.
    """
    floats = [format for format in problem.layers[0].formats if format in FLOAT_FORMATS]
    filled = [_filled(problem, order, float_format) for float_format in floats]
    held = min(filled, key=lambda held: _error(problem, held))
    return one_slot_each(problem, lambda position, expert: held[position][expert])


def _filled(problem: Problem, order: Sequence[Place], float_format: Format) -> list[list[int]]:
    """The format of every expert of every layer, as an index into the layer's formats."""
    layers = problem.layers
    usable = [[_by_size(layer, expert, float_format) for expert in range(layer.experts)] for layer in layers]
    held = [[formats[0] for formats in layer] for layer in usable]
    room = problem.budget - sum(int(layers[p].size[f]) for p, layer in enumerate(held) for f in layer)
    for step in range(1, max(len(formats) for layer in usable for formats in layer)):
        for position, expert in order:
            formats, size = usable[position][expert], layers[position].size
            if step >= len(formats) or held[position][expert] != formats[step - 1]:
                continue
            more = int(size[formats[step]] - size[formats[step - 1]])
            if more <= room:
                held[position][expert] = formats[step]
                room -= more
    return held


def _error(problem: Problem, held: list[list[int]]) -> float:
    return sum(
        float(layer.error[np.arange(layer.experts), formats].sum()) for layer, formats in zip(problem.layers, held, strict=True)
    )


def one_slot_each(problem: Problem, format_of: Callable[[int, int], int]) -> list[list[Slot]]:
    """Ranks in consecutive blocks. ``format_of(layer's position, expert)`` is an index into the layer's formats."""
    return [
        [
            Slot(expert=expert, format=layer.formats[format_of(position, expert)], rank=int(rank))
            for expert, rank in enumerate(contiguous(layer.experts, problem.ranks))
        ]
        for position, layer in enumerate(problem.layers)
    ]


def _by_size(layer: Layer, expert: int, float_format: Format) -> list[int]:
    """Indices of the formats that ``expert`` can take together with ``float_format``, smallest first."""
    usable = [
        position
        for position, format in enumerate(layer.formats)
        if np.isfinite(layer.error[expert, position]) and (format == float_format or format not in FLOAT_FORMATS)
    ]
    return sorted(usable, key=lambda position: int(layer.size[position]))
