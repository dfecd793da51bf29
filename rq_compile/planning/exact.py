"""Closes the remaining gap: a complete search of what could still be better than a known allocation.

At the best price, a choice costs some amount more than the best alternative (its reduced cost). A solution with this choice is
worse than the bound by at least that amount. Only choices within the gap between the known value and the bound can therefore be
part of a better solution (reduced-cost fixing; Nemhauser and Wolsey 1988, II.5.4). Usually few choices remain, and dynamic
programming over the bytes by which they can differ finds the best. If that is too much work, the gap remains and is reported.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np

from rq_compile.planning.allocation import Allocation, LayerChoice, LayerChoices, slot_experts
from rq_compile.planning.metrics import copy_numbers

# Sums and comparisons; about a second.
MOST_WORK = 400_000_000


@dataclass(frozen=True)
class _Item:
    """Slots of ``expert`` that get one format: all its copies or, with mixed copies, only copy number ``copy``.

    It holds the formats that remain, the cost of each, and its bytes, in units, in excess of the smallest of them.
    """

    expert: int
    copy: int
    formats: np.ndarray
    cost: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class _Stop:
    """A layer with ``replicas`` replicas. The decided part costs ``cost`` and takes ``size`` units; ``items`` are undecided."""

    replicas: int
    cost: float
    size: int
    items: list[_Item]
    certain: list[_Item]


def polished(layers: list[LayerChoices], allowed: list[list[int]], known: Allocation, budget: int) -> Allocation:
    """A solution that is better than ``known`` and proved to be the best, or ``known`` if there is none or the work is too much.

    ``allowed[l]``: the numbers of replicas that layer l may have.
    """
    if known.value <= known.bound:
        return known
    unit = gcd(*(int(size) for layer in layers for size in layer.size))
    # A little more than the gap, because reduced costs have rounding errors.
    gap = (known.value - known.bound) + 1e-9 * known.value
    stops = [_stops(layer, numbers, known.price, gap, unit) for layer, numbers in zip(layers, allowed, strict=True)]
    least = [min(stop.size for stop in choices) for choices in stops]
    room = budget // unit - sum(least)
    work = sum(len(item.formats) for choices in stops for stop in choices for item in stop.items)
    if room < 0 or (work + sum(map(len, stops))) * (room + 1) > MOST_WORK:
        return known
    found = _best(stops, least, room)
    value, chosen = found
    if value >= known.value:
        # Nothing that could be better fits, so the known solution is the best.
        return Allocation(known.layers, known.value, known.value, known.price)
    made = [_choice(layer, stop, formats) for layer, (stop, formats) in zip(layers, chosen, strict=True)]
    return Allocation(made, value, value, known.price)


def _stops(layer: LayerChoices, allowed: list[int], price: float, gap: float, unit: int) -> list[_Stop]:
    total = layer.priced(price)[allowed]
    return [
        _stop(layer, number, price, gap - float(more), unit)
        for number, more in zip(allowed, total - total.min(), strict=True)
        if more <= gap
    ]


def _stop(layer: LayerChoices, replicas: int, price: float, allowance: float, unit: int) -> _Stop:
    copies = layer.sequence.counts(replicas, layer.experts)
    cost, size = float(layer.penalty[replicas]), 0
    open_items, certain = [], []
    for expert, count in enumerate(copies.tolist()):
        shares = count if layer.mixed else 1
        paid = (layer.error[expert] + price * count * layer.size) / shares
        formats = np.flatnonzero(paid - paid.min() <= allowance)
        formats = formats[np.argsort(layer.size[formats], kind="stable")]
        units = layer.size[formats] * (count // shares) // unit
        for copy in range(shares):
            item = _Item(expert, copy, formats, layer.error[expert, formats] / shares, units - units[0])
            size += int(units[0])
            if len(formats) > 1:
                open_items.append(item)
            else:
                cost += float(item.cost[0])
                certain.append(item)
    return _Stop(replicas, cost, size, open_items, certain)


def _best(stops: list[list[_Stop]], least: list[int], room: int) -> tuple[float, list[tuple[_Stop, list[int]]]]:
    """The least cost in ``room`` units beyond the ``least`` of every layer, and each layer's stop with its items' formats."""
    # cost[u]: cost of the best choice for the layers so far that takes u units.
    cost = np.full(room + 1, np.inf)
    cost[0] = 0.0
    history = []
    for choices, fewest in zip(stops, least, strict=True):
        tables, decisions = [], []
        for stop in choices:
            table = _shifted(cost, stop.size - fewest) + stop.cost
            decided = []
            for item in stop.items:
                options = np.stack([_shifted(table, int(u)) + c for u, c in zip(item.size, item.cost, strict=True)])
                decided.append(options.argmin(axis=0).astype(np.uint8))
                table = options.min(axis=0)
            tables.append(table)
            decisions.append(decided)
        stacked = np.stack(tables)
        history.append((stacked.argmin(axis=0), decisions))
        cost = stacked.min(axis=0)
    units = int(cost.argmin())
    value = float(cost[units])
    chosen: list[tuple[_Stop, list[int]]] = []
    for choices, fewest, (which, decisions) in reversed(list(zip(stops, least, history, strict=True))):
        number = int(which[units])
        stop, formats = choices[number], []
        for item, decided in reversed(list(zip(stop.items, decisions[number], strict=True))):
            option = int(decided[units])
            formats.append(int(item.formats[option]))
            units -= int(item.size[option])
        units -= stop.size - fewest
        chosen.append((stop, formats[::-1]))
    return value, chosen[::-1]


def _shifted(table: np.ndarray, units: int) -> np.ndarray:
    """``table``, if every choice takes ``units`` more units."""
    moved = np.full_like(table, np.inf)
    if units < len(table):
        moved[units:] = table[: len(table) - units]
    return moved


def _choice(layer: LayerChoices, stop: _Stop, formats: list[int]) -> LayerChoice:
    copies = layer.sequence.counts(stop.replicas, layer.experts)
    of_item = {(item.expert, item.copy): format for item, format in zip(stop.items, formats, strict=True)}
    of_item |= {(item.expert, item.copy): int(item.formats[0]) for item in stop.certain}
    experts = slot_experts(copies)
    number, _ = copy_numbers(experts)
    slots = zip(experts.tolist(), number.tolist() if layer.mixed else [0] * len(experts), strict=True)
    return LayerChoice(copies, np.array([of_item[slot] for slot in slots]))
