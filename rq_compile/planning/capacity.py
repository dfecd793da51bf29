"""Lanes of the batched lowering: which slots share a product, and how wide its lanes are.

Slots with the same format and capacity class are the lanes of one batched matrix product. All its lanes are as wide as its
busiest slot requires. Wide lanes for busy slots and narrow lanes for cold slots keep the padding small.
"""

from collections.abc import Sequence

import numpy as np

from rq_compile.planning.schema import Slot
from rq_compile.quantization.formats import COMPUTED_FORMATS, FORMATS, Format

CLASSES = 4


def capacity_classes(shares: np.ndarray, formats: Sequence[Format], classes: int = CLASSES) -> np.ndarray:
    """The capacity class of every slot, int64 ``[S]``, with the least padding; class 0 is the widest of a format.

    ``shares`` float ``[texts, S]``: the share of each text's pairs that each slot is expected to get. The padding is minimised
    in the mean over texts. A format has at most ``classes`` classes, each a run of its slots sorted by mean share. The best runs
    are found exactly, by dynamic programming over the cuts. A class that would save nothing is not used.
    """
    labels = np.zeros(len(formats), np.int64)
    for format in COMPUTED_FORMATS:
        mine = [slot for slot, held in enumerate(formats) if held == format]
        if mine:
            labels[mine] = _classes_of_one_format(shares[:, mine], classes)
    return labels


def lane_groups(slots: Sequence[Slot]) -> np.ndarray:
    """The number of each slot's batched product, int64 ``[S]``. Products are numbered by format, then by class."""
    keys = [(FORMATS.index(slot.format), slot.capacity_class) for slot in slots]
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    return np.array([numbers[key] for key in keys], np.int64)


def expected_loads(slots: Sequence[Slot]) -> np.ndarray:
    """The share of a layer's pairs that each of its slots is expected to get, float64 ``[S]``. If any is unknown, all are
    equal."""
    loads = [slot.load for slot in slots]
    if any(load is None for load in loads):
        return np.full(len(loads), 1 / len(loads))
    return np.array(loads, np.float64)


def _classes_of_one_format(shares: np.ndarray, classes: int) -> np.ndarray:
    order = np.argsort(-shares.mean(axis=0), kind="stable")
    shares, slots = shares[:, order], len(order)
    # lanes[i, j]: rows of one class that holds the sorted slots i .. j.
    lanes = np.full((slots, slots), np.inf)
    for start in range(slots):
        widest = np.maximum.accumulate(shares[:, start:], axis=1).mean(axis=0)
        lanes[start, start:] = widest * np.arange(1, slots - start + 1)
    best, cuts = lanes[0], []
    for _ in range(1, min(classes, slots)):
        # A further class starts at `start`, after the best classes of the slots before it.
        total = best[:-1, None] + lanes[1:]
        start, split = total.argmin(axis=0) + 1, total.min(axis=0)
        worthwhile = split < best * (1 - 1e-9)
        cuts.append(np.where(worthwhile, start, 0))
        best = np.where(worthwhile, split, best)
    labels = np.zeros(slots, np.int64)
    end = slots
    for cut in reversed(cuts):
        if start := int(cut[end - 1]):
            labels[order[start:]] += 1
            end = start
    return labels
