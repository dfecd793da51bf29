"""A format for every item under a budget of bytes: the multiple-choice knapsack (Sinha and Zoltners 1979)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FormatChoice:
    """``format`` int64 ``[N]`` and the total ``error``. ``bound``: a lower bound of the error of all choices within the budget.

    ``price``: the error that one more byte would save in the linear relaxation.
    """

    format: np.ndarray
    error: float
    bound: float
    price: float


def choose_formats(error: np.ndarray, size: np.ndarray, budget: int) -> FormatChoice | None:
    """The formats with the least total error within ``budget`` bytes, or None if not even the smallest formats fit.

    ``error`` is float and ``size`` int64, both ``[N, F]``; an infinite error forbids a format. Every item starts with its
    smallest format and climbs its lower convex hull. The steps of all items are taken in the order of falling gain per byte. Up
    to the first step that does not fit, this is the optimum of the linear relaxation; its value with a part of that step is the
    bound. After it, every further step that fits is taken. The result therefore exceeds the bound by less than one step's gain.
    """
    start = smallest_formats(error, size)
    left = budget - int(_at(size, start).sum())
    if left < 0:
        return None
    step = _hull_steps(error, size, start)
    total = np.cumsum(step.bytes)
    whole = int(np.searchsorted(total, left, side="right"))
    chosen = start.copy()
    chosen[step.item[:whole]] = step.to[:whole]
    bound = float(_at(error, chosen).sum())
    left -= int(total[whole - 1]) if whole else 0
    price = 0.0
    if whole < len(step.item):
        price = float(step.gain[whole] / step.bytes[whole])
        bound -= price * left
        left = _take_what_fits(step, whole, chosen, left)
        _spend(error, size, chosen, left)
    value = float(_at(error, chosen).sum())
    return FormatChoice(chosen, value, min(bound, value), price)


def smallest_formats(error: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The smallest possible format of every item, int64 ``[N]``; among equally small ones, that with the least error."""
    possible = np.where(np.isfinite(error), size, np.iinfo(np.int64).max)
    return np.where(possible == possible.min(axis=1, keepdims=True), error, np.inf).argmin(axis=1)


@dataclass(frozen=True)
class _Steps:
    """Steps to better formats by falling gain per byte, all ``[steps]``. The steps of one item are in the order of its hull."""

    item: np.ndarray
    to: np.ndarray
    gain: np.ndarray
    bytes: np.ndarray


def _at(values: np.ndarray, format: np.ndarray) -> np.ndarray:
    return values[np.arange(len(format)), format]


def _hull_steps(error: np.ndarray, size: np.ndarray, start: np.ndarray) -> _Steps:
    at = start
    found: list[tuple[np.ndarray, ...]] = []
    for _ in range(error.shape[1]):
        gain, paid = _at(error, at)[:, None] - error, size - _at(size, at)[:, None]
        rate = np.where((gain > 0) & (paid > 0), gain / np.maximum(paid, 1), -1.0)
        best = rate.max(axis=1)
        # Of several steps along one edge of the hull, take the longest.
        to = np.where(rate >= best[:, None] * (1 - 1e-12), paid, -1).argmax(axis=1)
        climbing = np.flatnonzero(best > 0)
        found.append((climbing, to[climbing], _at(gain, to)[climbing], _at(paid, to)[climbing]))
        at = np.where(best > 0, to, at)
    item, to, gain, paid = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(-gain / np.maximum(paid, 1), kind="stable")
    return _Steps(item[order], to[order], gain[order], paid[order])


def _take_what_fits(step: _Steps, first: int, chosen: np.ndarray, left: int) -> int:
    """Take every further step that fits and whose item took the previous step. Returns the bytes left."""
    stopped: set[int] = set()
    smallest = int(step.bytes[first:].min())
    for item, to, paid in zip(step.item[first:].tolist(), step.to[first:].tolist(), step.bytes[first:].tolist(), strict=True):
        if left < smallest:
            break
        if paid <= left and item not in stopped:
            chosen[item] = to
            left -= paid
        else:
            stopped.add(item)
    return left


def _spend(error: np.ndarray, size: np.ndarray, chosen: np.ndarray, left: int) -> None:
    """Take better formats, on the hull or not, as long as one fits into the bytes ``left``. Changes ``chosen`` in place."""
    while True:
        gain, paid = _at(error, chosen)[:, None] - error, size - _at(size, chosen)[:, None]
        gain = np.where((gain > 0) & (paid <= left), gain, 0.0)
        item, to = (int(index) for index in np.unravel_index(gain.argmax(), gain.shape))
        if gain[item, to] <= 0:
            return
        chosen[item] = to
        left -= int(paid[item, to])
