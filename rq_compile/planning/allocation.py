"""Copies and formats for all layers together under one budget of bytes, with a bound on the optimum.

The problem: layer l takes the first i replicas of its copy sequence, and expert e takes a format f; minimise

    sum_l  penalty[l, i]  +  sum_e  error[l, e, f]      subject to      sum_{l, e} copies[l, e](i) * size[l, f]  <=  budget.

Relaxing the budget with a price per byte makes layers and experts independent (Everett 1963). The best solution for a price is
then found exactly and fast, and its value minus ``price * budget`` is a lower bound of the optimum. The best price is found by
repeatedly intersecting the lines of the best known solutions within and above the budget, which ends at the maximum of the
dual. The two solutions there differ in few layers. The search goes from one to the other, layer by layer, computes the best
formats for every choice of copies on the way, and takes the best of all.
"""

from dataclasses import dataclass

import numpy as np

from rq_compile.planning.copies import CopySequence
from rq_compile.planning.knapsack import choose_formats, smallest_formats


@dataclass(frozen=True)
class LayerChoices:
    """The choices of one layer.

    ``penalty [n + 1]``: cost of stopping after i replicas. ``error`` float ``[m, F]``: error of each expert in each format, inf
    if the format is forbidden. ``size`` int64 ``[F]``: bytes of an expert. If ``mixed``, each copy of an expert has its own
    format and an equal share of the error.
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
        """The least sum of penalty, error and ``price`` times bytes for every number of replicas, float ``[n + 1]``.

        Mixing formats has no advantage here: for a given price, the same format is best for all copies of an expert.
        """
        expert, copy = self.sequence.expert, self.sequence.copy
        paid = price * self.size
        alone = (self.error + paid).min(axis=1).sum()
        more = (self.error[expert] + copy[:, None] * paid).min(axis=1)
        less = (self.error[expert] + (copy[:, None] - 1) * paid).min(axis=1)
        return self.penalty + alone + np.concatenate([[0.0], np.cumsum(more - less)])


@dataclass(frozen=True)
class LayerChoice:
    """``copies [m]``: number of copies of every expert. ``format [S]``: columns of ``LayerChoices.size``, in the order of
    ``slot_experts``."""

    copies: np.ndarray
    format: np.ndarray


@dataclass(frozen=True)
class Allocation:
    """``value``: the objective of ``layers``. ``bound``: a lower bound of the objective of all choices that fit the budget.

    ``price``: the price per byte for which the bound was found.
    """

    layers: list[LayerChoice]
    value: float
    bound: float
    price: float


def slot_experts(copies: np.ndarray) -> np.ndarray:
    """The expert of every slot, int64 ``[S]``: first all experts, then those with a second copy, and so on."""
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
    """Error and bytes of the items that get a format, both ``[items, F]``. An item is an expert with all its copies or, if
    ``mixed``, a slot."""
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
    """The solution with the least ``objective + price * bytes``."""
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
    """The best formats for ``start`` and for every step from it to ``end``, changing one layer at a time."""
    replicas = list(start)
    found = [allocate_copies(layers, replicas, budget)]
    for place in range(len(layers)):
        if start[place] != end[place]:
            replicas[place] = end[place]
            found.append(allocate_copies(layers, replicas, budget))
    return [allocation for allocation in found if allocation is not None]
