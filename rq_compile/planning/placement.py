"""Which rank holds which slot. Two copies of one expert never share a rank: a copy beside its original relieves nobody."""

import numpy as np


def contiguous(experts: np.ndarray, ranks: int, total: int) -> np.ndarray:
    """Expert-parallel layout without a plan, int64 ``[S]``: rank r holds the r-th consecutive block of the ``total`` experts."""
    return experts * ranks // total


def pack(load: np.ndarray, experts: np.ndarray, ranks: int) -> np.ndarray:
    """Ranks int64 ``[S]`` of slots holding ``experts [S]`` such that the busiest rank of any text is least busy.

    ``load`` float ``[texts, S]``. Every rank holds ``S // ranks`` or one slot more. Longest processing time first (Graham 1969),
    with the two restrictions, then exchanges of two slots while any lowers the busiest rank's load.

    Raises:
        ValueError: an expert has more copies than there are ranks.
    """
    if np.bincount(experts).max() > ranks:
        raise ValueError(f"expert {np.bincount(experts).argmax()} has more copies than the {ranks} ranks")
    return _Packing(load, experts, ranks).packed()


class _Packing:
    def __init__(self, load: np.ndarray, experts: np.ndarray, ranks: int) -> None:
        self.load, self.experts, self.ranks = load, experts, ranks
        self.rank = np.full(len(experts), -1, np.int64)
        self.held = np.zeros(ranks, np.int64)
        self.rank_load = np.zeros((len(load), ranks))
        self.holds = np.zeros((ranks, int(experts.max()) + 1), bool)

    def packed(self) -> np.ndarray:
        for slot in np.argsort(-self.load.max(axis=0), kind="stable"):
            self._place(int(slot))
        return self.rank

    def _place(self, slot: int) -> None:
        capacity = -(-len(self.experts) // self.ranks)
        # At most S mod R ranks take the slot more.
        full_ranks = (self.held == capacity).sum()
        if len(self.experts) % self.ranks and full_ranks >= len(self.experts) % self.ranks:
            capacity -= 1
        room = self.held < capacity
        free = room & ~self.holds[:, self.experts[slot]]
        if not free.any():
            rank = self._make_room(slot, int(np.flatnonzero(room)[0]))
        else:
            worst = (self.rank_load + self.load[:, slot, None]).max(axis=0)
            rank = int(np.where(free, worst, np.inf).argmin())
        self._put(slot, rank)

    def _make_room(self, slot: int, room: int) -> int:
        """A rank without the slot's expert hands one of its slots to ``room``, which has space but holds that expert already.

        It always can: it is full, so it holds an expert that ``room`` does not.
        """
        rank = int(np.flatnonzero(~self.holds[:, self.experts[slot]])[0])
        mine = np.flatnonzero(self.rank == rank)
        moved = next(int(other) for other in mine if not self.holds[room, self.experts[other]])
        self.holds[rank, self.experts[moved]] = False
        self.held[rank] -= 1
        self.rank_load[:, rank] -= self.load[:, moved]
        self._put(moved, room)
        return rank

    def _put(self, slot: int, rank: int) -> None:
        self.rank[slot] = rank
        self.held[rank] += 1
        self.rank_load[:, rank] += self.load[:, slot]
        self.holds[rank, self.experts[slot]] = True
