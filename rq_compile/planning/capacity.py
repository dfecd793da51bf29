"""Capacity classes of the batched lowering: slots of similar load share lanes of one width."""

import numpy as np

CLASSES = 3


def capacity_classes(share: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    """The class of every slot, int64 ``[S]``, class 0 the widest, such that the lanes are least padded.

    ``share`` float ``[S]``: the expected load of every slot. Classes are runs of the slots sorted by load; the best cuts are
    found exactly by dynamic programming, and a class that would save nothing is not opened.
    """
    slots = len(share)
    order = np.argsort(-share, kind="stable")
    sorted_share = share[order]
    starts, ends = np.arange(slots), np.arange(1, slots + 1)
    # width[i, j]: rows of one class that holds the sorted slots i .. j.
    width = np.where(ends[None] > starts[:, None], sorted_share[:, None] * (ends[None] - starts[:, None]), np.inf)
    best, cuts = width[0], []
    for _ in range(1, min(classes, slots)):
        # A further class starts at i, after the best of what ends before it.
        total = best[:-1, None] + width[1:]
        start = total.argmin(axis=0) + 1
        split = total.min(axis=0)
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
