"""Copies and formats for all layers together under one budget of bytes, with a proof of how good they are.

The problem. Layer l takes the first i replicas of its copy sequence, expert e a format f; minimise

    sum_l  penalty[l, i]  +  sum_e  error[l, e, f]      subject to      sum_{l, e} copies[l, e](i) * size[l, f]  <=  budget.

Relaxing the budget with a price per byte makes layers and experts independent (Everett 1963), so that the best for a price is
found exactly and fast, and its value less ``price * budget`` bounds the optimum from below. The best price is found by
intersecting the two lines that the best known solutions within and above the budget span, which ends at the maximum of the
dual. The two solutions there differ in few layers; going from one to the other, layer by layer, every choice of copies on the way
gets its best formats, and the best of all is taken.
"""

from dataclasses import dataclass

import numpy as np

from rq_compile.planning.copies import CopySequence
from rq_compile.planning.knapsack import choose_formats, smallest_formats


@dataclass(frozen=True)
class LayerChoices:
    """What one layer may choose. ``penalty [n + 1]``: cost of stopping after i replicas.

    ``error`` float ``[m, F]`` of an expert's format, inf where it is forbidden; ``size`` int64 ``[F]``. With ``mixed``, each copy
    of an expert has a format of its own and an equal share of the error.
    """

    sequence: CopySequence
    penalty: np.ndarray
    error: np.ndarray
    size: np.ndarray
    mixed: bool = False

    @property
    def experts(self) -> int:
        return len(self.error)

    def priced(self, price: float) -> np.ndarray:
        """The least penalty, error and ``price`` times bytes for every number of replicas, float ``[n + 1]``.

        Mixing formats gains nothing here: at a price all copies of an expert want the same one.
        """
        expert, copy = self.sequence.expert, self.sequence.copy
        paid = price * self.size
        alone = (self.error + paid).min(axis=1).sum()
        more = (self.error[expert] + copy[:, None] * paid).min(axis=1)
        less = (self.error[expert] + (copy[:, None] - 1) * paid).min(axis=1)
        return self.penalty + alone + np.concatenate([[0.0], np.cumsum(more - less)])


@dataclass(frozen=True)
class LayerChoice:
    """``copies [m]`` of every expert and, in the order of ``slot_experts``, ``format [S]``: columns of ``LayerChoices.size``."""

    copies: np.ndarray
    format: np.ndarray


@dataclass(frozen=True)
class Allocation:
    """``value`` is the objective of ``layers``; no choice that fits the budget has less than ``bound``.

    ``price``: what a byte more would save, at which the bound was found.
    """

    layers: list[LayerChoice]
    value: float
    bound: float
    price: float


def slot_experts(copies: np.ndarray) -> np.ndarray:
    """The expert of every slot, int64 ``[S]``: all experts once, then those with a second copy, and so on."""
    return np.concatenate([np.flatnonzero(copies > number) for number in range(copies.max())])


def allocate(layers: list[LayerChoices], budget: int) -> Allocation | None:
    """The least objective within ``budget`` bytes, or None if nothing fits."""
    bare = [0] * len(layers)
    within = _solution(layers, bare, [smallest_formats(layer.error, layer.size[None]) for layer in layers])
    if within.bytes > budget:
        return None
    above = _priced(layers, 0.0)
    bound, best_price = above.value, 0.0
    if above.bytes <= budget:
        within = above
    while above.bytes > budget:
        price = (within.value - above.value) / (above.bytes - within.bytes)
        found = _priced(layers, price)
        lagrangian = found.value + price * found.bytes
        if lagrangian - price * budget > bound:
            bound, best_price = lagrangian - price * budget, price
        if lagrangian >= (within.value + price * within.bytes) * (1 - 1e-12) or found.bytes in (within.bytes, above.bytes):
            break
        within, above = (found, above) if found.bytes <= budget else (within, found)
    best = min(_on_the_way(layers, within.replicas, above.replicas, budget), key=lambda allocation: allocation.value)
    return Allocation(best.layers, best.value, min(bound, best.value), best_price)


def allocate_copies(layers: list[LayerChoices], replicas: list[int], budget: int) -> Allocation | None:
    """The best formats for the first ``replicas`` of every layer's copy sequence, or None if nothing fits."""
    copies = [layer.sequence.counts(count, layer.experts) for layer, count in zip(layers, replicas, strict=True)]
    items = [_items(layer, held) for layer, held in zip(layers, copies, strict=True)]
    error = np.concatenate([error for error, _ in items])
    size = np.concatenate([size for _, size in items])
    found = choose_formats(error, size, budget)
    if found is None:
        return None
    penalty = float(sum(layer.penalty[count] for layer, count in zip(layers, replicas, strict=True)))
    ends = np.cumsum([len(error) for error, _ in items])[:-1]
    chosen = [
        LayerChoice(held, format if layer.mixed else format[slot_experts(held)])
        for layer, held, format in zip(layers, copies, np.split(found.format, ends), strict=True)
    ]
    return Allocation(chosen, penalty + found.error, penalty + found.bound, found.price)


def _items(layer: LayerChoices, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What gets a format: experts with all their copies or, if ``mixed``, slots. Error and bytes, both ``[items, F]``."""
    if layer.mixed:
        held = slot_experts(copies)
        return layer.error[held] / copies[held, None], np.broadcast_to(layer.size, (len(held), len(layer.size)))
    return layer.error, copies[:, None] * layer.size


@dataclass(frozen=True)
class _Solution:
    replicas: list[int]
    value: float
    bytes: int


def _priced(layers: list[LayerChoices], price: float) -> _Solution:
    """The least ``objective + price * bytes``."""
    replicas, formats = [], []
    for layer in layers:
        replicas.append(int(layer.priced(price).argmin()))
        copies = layer.sequence.counts(replicas[-1], layer.experts)
        formats.append((layer.error + price * copies[:, None] * layer.size).argmin(axis=1))
    return _solution(layers, replicas, formats)


def _solution(layers: list[LayerChoices], replicas: list[int], formats: list[np.ndarray]) -> _Solution:
    value, size = 0.0, 0
    for layer, count, format in zip(layers, replicas, formats, strict=True):
        copies = layer.sequence.counts(count, layer.experts)
        value += float(layer.penalty[count] + layer.error[np.arange(layer.experts), format].sum())
        size += int((copies * layer.size[format]).sum())
    return _Solution(replicas, value, size)


def _on_the_way(layers: list[LayerChoices], start: list[int], end: list[int], budget: int) -> list[Allocation]:
    """The best formats for ``start``, and for every step from it to ``end`` that takes one layer after the other."""
    replicas = list(start)
    found = [allocate_copies(layers, replicas, budget)]
    for place in range(len(layers)):
        if start[place] != end[place]:
            replicas[place] = end[place]
            found.append(allocate_copies(layers, replicas, budget))
    return [allocation for allocation in found if allocation is not None]
