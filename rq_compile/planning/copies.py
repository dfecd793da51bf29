"""How many copies each expert gets: a sequence of replicas whose prefixes are all optimal for the load that they reach."""

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CopySequence:
    """Replicas in the order in which they should be added.

    ``expert [n]`` gets the i-th replica, as its copy number ``copy [n]`` (2 for its first replica). With the first i replicas,
    the busiest slot has load ``level [n + 1]``, or ``drift_level [n + 1]`` if any one expert may gain load. From the replica
    ``balanced`` on, no slot that could be relieved is above the goal. Before it, gains are not considered, and ``drift_level``
    falls with ``level``.
    """

    expert: np.ndarray
    copy: np.ndarray
    level: np.ndarray
    drift_level: np.ndarray
    balanced: int

    def counts(self, replicas: int, experts: int) -> np.ndarray:
        """Copies of every expert with the first ``replicas`` of the sequence, int64 ``[m]``."""
        return 1 + np.bincount(self.expert[:replicas], minlength=experts)


def copy_sequence(
    load: np.ndarray, *, goal: float, gain: np.ndarray, most_copies: int, replicas: int | None = None
) -> CopySequence:
    """First bring the expected ``load [m]`` below ``goal``, then ``load + gain``, always copying the busiest expert.

    If a slot's load is bounded by M, expert e needs ``ceil(load[e] / M)`` copies. The first part of the sequence passes through
    exactly these counts: no other choice with the same load of the busiest slot has fewer copies of any expert. The second part
    does the same for ``load + gain``, starting from the first. No expert gets more than ``most_copies``. With ``replicas``, the
    sequence has that many replicas, as far as there are experts to copy, whether or not the goal is met.
    """
    count = np.ones(len(load), np.int64)
    most = len(load) * most_copies if replicas is None else replicas
    order = _relieve(load, count, goal, most_copies, most)
    balanced = len(order)
    order += _relieve(load + gain, count, goal if replicas is None else -np.inf, most_copies, most - balanced)
    expert = np.array(order, np.int64)
    copy = np.empty_like(expert)
    level, drift_level = np.empty(len(order) + 1), np.empty(len(order) + 1)
    count[:] = 1
    for replica in range(len(order) + 1):
        level[replica] = (load / count).max()
        drift_level[replica] = ((load + gain) / count).max()
        if replica < len(order):
            count[expert[replica]] += 1
            copy[replica] = count[expert[replica]]
    drift_level[:balanced] = level[:balanced] - level[balanced] + drift_level[balanced]
    return CopySequence(expert, copy, level, drift_level, balanced)


def sequence_of(copies: np.ndarray) -> CopySequence:
    """The sequence that ends with ``copies [m]``; it has no loads."""
    expert = np.concatenate([np.flatnonzero(copies > number) for number in range(1, copies.max())] or [np.zeros(0, np.int64)])
    number = np.concatenate([np.full((copies > number).sum(), number + 1) for number in range(1, copies.max())] or [expert])
    unknown = np.full(len(expert) + 1, np.nan)
    return CopySequence(expert, number, unknown, unknown, len(expert))


def _relieve(load: np.ndarray, count: np.ndarray, goal: float, most_copies: int, replicas: int) -> list[int]:
    """Experts to copy, in order, until every slot that can be relieved is at or below ``goal``. Updates ``count``."""
    heap = [(-float(load[e] / count[e]), e) for e in range(len(load)) if count[e] < most_copies]
    heapq.heapify(heap)
    order: list[int] = []
    while heap and len(order) < replicas and -heap[0][0] > goal:
        _, expert = heapq.heappop(heap)
        order.append(expert)
        count[expert] += 1
        if count[expert] < most_copies:
            heapq.heappush(heap, (-float(load[expert] / count[expert]), expert))
    return order
