"""How many copies each expert gets: the one sequence of replicas in which every prefix is the best for its length."""

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CopySequence:
    """Replicas in the order in which they are worth adding.

    ``expert [n]`` gets the i-th replica, as its copy number ``copy [n]`` (2 for its first replica). ``level [n + 1]`` is the
    load of the busiest slot with the first i replicas.
    """

    expert: np.ndarray
    copy: np.ndarray
    level: np.ndarray

    def counts(self, replicas: int, experts: int) -> np.ndarray:
        """Copies of every expert with the first ``replicas`` of the sequence, int64 ``[m]``."""
        return 1 + np.bincount(self.expert[:replicas], minlength=experts)


def copy_sequence(load: np.ndarray, *, most_copies: int, replicas: int, until: float = 0.0) -> CopySequence:
    """Always copy the expert whose slots are busiest, until no slot is above ``until`` or ``replicas`` are spent.

    ``load`` float ``[m]``: expected load of every expert. For any bound M on a slot's load, expert e needs at least
    ``ceil(load[e] / M)`` copies, and the sequence passes through exactly these counts: no other choice of as many replicas has a
    less busy slot, and none with as busy a slot has fewer copies of any expert. An expert with ``most_copies`` gets no more.
    """
    heap = [(-float(value), expert, 1) for expert, value in enumerate(load)]
    heapq.heapify(heap)
    at_most = 0.0  # the busiest slot among experts that may not be copied again
    experts: list[int] = []
    copies: list[int] = []
    level = [-heap[0][0]]
    while heap and len(experts) < replicas and level[-1] > until:
        value, expert, count = heapq.heappop(heap)
        if count == most_copies:
            at_most = max(at_most, -value)
            continue
        experts.append(expert)
        copies.append(count + 1)
        heapq.heappush(heap, (-float(load[expert]) / (count + 1), expert, count + 1))
        level.append(max(at_most, -heap[0][0]))
    return CopySequence(np.array(experts, np.int64), np.array(copies, np.int64), np.array(level))
