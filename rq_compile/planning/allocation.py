"""Copies and formats for all layers together under one budget of bytes, with a proof of how good they are.

The problem. Layer l takes the first i replicas of its copy sequence, expert e a format f; minimise

    sum_l  penalty[l, i]  +  sum_e  error[l, e, f]      subject to      sum_{l, e} copies[l, e](i) * size[l, f]  <=  budget.

Relaxing the budget with a price per byte makes layers and experts independent (Lagrange; Everett 1963), so that the best for a
price is found exactly and fast, and its value less ``price * budget`` bounds the optimum from below. The best price is found by
intersecting the two lines that the best known solutions within and above the budget span; this ends at the maximum of the dual.
What is left of the budget is then spent step by step where a byte saves most.
"""

from dataclasses import dataclass

import numpy as np

from rq_compile.planning.copies import CopySequence


@dataclass(frozen=True)
class LayerChoices:
    """What one layer may choose. ``penalty [n + 1]``: cost of stopping after i replicas; inf where that is not allowed.

    ``error`` float ``[m, F]``, ``size`` int64 ``[F]``.
    """

    sequence: CopySequence
    penalty: np.ndarray
    error: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class LayerChoice:
    """``replicas`` of the layer's copy sequence, ``copies [m]`` and ``format [m]`` (a column of ``LayerChoices.size``)."""

    replicas: int
    copies: np.ndarray
    format: np.ndarray


@dataclass(frozen=True)
class Allocation:
    """``value`` is the objective of ``layers``; no choice at all that fits the budget has less than ``bound``."""

    layers: list[LayerChoice]
    value: float
    bytes: int
    bound: float


def allocate(layers: list[LayerChoices], budget: int) -> Allocation | None:
    """The least objective within ``budget`` bytes, or None if nothing fits."""
    cheapest = _priced(layers, np.inf)
    if cheapest.bytes > budget:
        return None
    free = _priced(layers, 0.0)
    if free.bytes <= budget:
        return Allocation(free.layers, free.value, free.bytes, free.value)
    within, above = cheapest, free
    bound = free.value
    while True:
        price = (within.value - above.value) / (above.bytes - within.bytes)
        found = _priced(layers, price)
        lagrangian = found.value + price * found.bytes
        bound = max(bound, lagrangian - price * budget)
        # On the line through both: the price is the best one.
        if lagrangian >= (within.value + price * within.bytes) * (1 - 1e-12) or found.bytes in (within.bytes, above.bytes):
            break
        if found.bytes <= budget:
            within = found
        else:
            above = found
    best = min((_filled(layers, start, budget) for start in (within, cheapest)), key=lambda solution: solution.value)
    return Allocation(best.layers, best.value, best.bytes, min(bound, best.value))


@dataclass(frozen=True)
class _Solution:
    layers: list[LayerChoice]
    value: float
    bytes: int


def _priced(layers: list[LayerChoices], price: float) -> _Solution:
    """The least ``objective + price * bytes``; at an infinite price, the fewest bytes and among those the least objective."""
    return _solution(layers, [_priced_layer(layer, price) for layer in layers])


def _priced_layer(layer: LayerChoices, price: float) -> LayerChoice:
    expert, copy = layer.sequence.expert, layer.sequence.copy
    if np.isinf(price):
        allowed = int(np.flatnonzero(np.isfinite(layer.penalty))[0])
        copies = layer.sequence.counts(allowed, len(layer.error))
        size = np.where(np.isfinite(layer.error), layer.size, np.iinfo(np.int64).max)
        smallest = np.where(size == size.min(axis=1, keepdims=True), layer.error, np.inf).argmin(axis=1)
        return LayerChoice(allowed, copies, smallest)
    paid = price * layer.size
    alone = (layer.error + paid).min(axis=1).sum()
    more = (layer.error[expert] + copy[:, None] * paid).min(axis=1)
    less = (layer.error[expert] + (copy[:, None] - 1) * paid).min(axis=1)
    total = alone + np.concatenate([[0.0], np.cumsum(more - less)]) + layer.penalty
    replicas = int(total.argmin())
    copies = layer.sequence.counts(replicas, len(layer.error))
    return LayerChoice(replicas, copies, (layer.error + copies[:, None] * paid).argmin(axis=1))


def _solution(layers: list[LayerChoices], chosen: list[LayerChoice]) -> _Solution:
    value = 0.0
    size = 0
    for layer, choice in zip(layers, chosen, strict=True):
        experts = np.arange(len(choice.format))
        value += float(layer.penalty[choice.replicas]) + float(layer.error[experts, choice.format].sum())
        size += int((choice.copies * layer.size[choice.format]).sum())
    return _Solution(chosen, value, size)


def _filled(layers: list[LayerChoices], start: _Solution, budget: int) -> _Solution:
    """``start`` with the bytes it leaves spent on better formats, always where a byte saves most of the error that still fits."""
    left = budget - start.bytes
    formats = [choice.format.copy() for choice in start.layers]
    while True:
        best: tuple[float, int, int, int, int] | None = None
        for place, (layer, choice, format) in enumerate(zip(layers, start.layers, formats, strict=True)):
            experts = np.arange(len(format))
            saved = layer.error[experts, format][:, None] - layer.error
            paid = choice.copies[:, None] * (layer.size[None] - layer.size[format][:, None])
            fits = (saved > 0) & (paid <= left)
            if fits.any():
                rate = np.where(fits, saved / np.maximum(paid, 1e-9), -1.0)
                expert, to = (int(index) for index in np.unravel_index(rate.argmax(), rate.shape))
                if best is None or rate[expert, to] > best[0]:
                    best = (float(rate[expert, to]), place, expert, to, int(paid[expert, to]))
        if best is None:
            break
        _, place, expert, to, paid_bytes = best
        formats[place][expert] = to
        left -= paid_bytes
    filled = [LayerChoice(c.replicas, c.copies, f) for c, f in zip(start.layers, formats, strict=True)]
    return _solution(layers, filled)
