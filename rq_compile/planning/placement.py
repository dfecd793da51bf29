"""Which rank holds which slot. Two copies of one expert never share a rank: a copy beside its original relieves nobody."""

import numpy as np

MOST_EXCHANGES = 1000


def contiguous(experts: np.ndarray, ranks: int, total: int) -> np.ndarray:
    """Expert-parallel layout without a plan, int64 ``[S]``: rank r holds the r-th consecutive block of the ``total`` experts."""
    return experts * ranks // total


def pack(load: np.ndarray, experts: np.ndarray, ranks: int, goal: float = 1.0) -> np.ndarray:
    """Ranks int64 ``[S]`` of slots holding ``experts [S]`` such that the busiest rank of any text is as little busy as possible.

    ``load`` float ``[texts, S]``. Every rank holds ``S // ranks`` slots or one more. Longest processing time first (Graham 1969)
    with the two restrictions, then exchanges of two slots between the busiest rank and another while one lowers it, until it is
    at most ``goal`` times the mean.

    Raises:
        ValueError: an expert has more copies than there are ranks.
    """
    if np.bincount(experts).max() > ranks:
        raise ValueError(f"expert {np.bincount(experts).argmax()} has more copies than the {ranks} ranks")
    packing = Packing(load, experts, ranks)
    for slot in np.argsort(-load.max(axis=0), kind="stable"):
        packing.place(int(slot))
    packing.exchange(goal)
    return packing.rank


class Packing:
    """Slots on ranks, some of them perhaps not placed yet (rank -1).

    ``rank [S]``; ``held [R]`` slots, ``rank_load [texts, R]`` and ``holds [R, m]``: whether a rank holds an expert.
    """

    def __init__(self, load: np.ndarray, experts: np.ndarray, ranks: int) -> None:
        self.load, self.experts, self.ranks = load, experts, ranks
        self.rank = np.full(len(experts), -1, np.int64)
        self.held = np.zeros(ranks, np.int64)
        self.rank_load = np.zeros((len(load), ranks))
        self.holds = np.zeros((ranks, int(experts.max()) + 1), bool)

    def put(self, slot: int, rank: int) -> None:
        self.rank[slot] = rank
        self.held[rank] += 1
        self.rank_load[:, rank] += self.load[:, slot]
        self.holds[rank, self.experts[slot]] = True

    def take(self, slot: int) -> None:
        rank = self.rank[slot]
        self.rank[slot] = -1
        self.held[rank] -= 1
        self.rank_load[:, rank] -= self.load[:, slot]
        self.holds[rank, self.experts[slot]] = False

    def place(self, slot: int) -> None:
        """Put ``slot`` where the busiest text stays least busy."""
        room = self.held < self._capacity()
        free = room & ~self.holds[:, self.experts[slot]]
        if free.any():
            worst = (self.rank_load + self.load[:, slot, None]).max(axis=0)
            rank = int(np.where(free, worst, np.inf).argmin())
        else:
            rank = self._make_room(slot, int(np.flatnonzero(room)[0]))
        self.put(slot, rank)

    def _capacity(self) -> int:
        """Slots a rank may hold: only S mod R ranks may have one more than the others."""
        least, more = divmod(len(self.experts), self.ranks)
        return least + 1 if (self.held > least).sum() < more else least

    def _make_room(self, slot: int, room: int) -> int:
        """A rank without the slot's expert hands one of its slots to ``room``, which has space but holds that expert already.

        It always can: it is full, so it holds an expert that ``room`` does not.
        """
        rank = int(np.flatnonzero(~self.holds[:, self.experts[slot]])[0])
        mine = np.flatnonzero(self.rank == rank)
        moved = next(int(other) for other in mine if not self.holds[room, self.experts[other]])
        self.take(moved)
        self.put(moved, room)
        return rank

    def exchange(self, goal: float) -> None:
        """Exchange slots of the busiest rank with those of others, each time the pair that helps most, while any helps."""
        bar = goal * self.rank_load.mean(axis=1).max()
        for _ in range(MOST_EXCHANGES):
            worst = self.rank_load.max(axis=0)
            busiest = int(worst.argmax())
            if worst[busiest] <= bar:
                return
            mine, others = np.flatnonzero(self.rank == busiest), np.flatnonzero(self.rank != busiest)
            theirs = self.rank[others]
            change = self.load[:, mine, None] - self.load[:, None, others]
            after = np.maximum(
                (self.rank_load[:, busiest, None, None] - change).max(axis=0),
                (self.rank_load[:, theirs][:, None] + change).max(axis=0),
            )
            barred = self.holds[theirs][:, self.experts[mine]].T | self.holds[busiest, self.experts[others]][None]
            after[barred] = np.inf
            here, there = (int(index) for index in np.unravel_index(after.argmin(), after.shape))
            if after[here, there] >= worst[busiest] * (1 - 1e-9):
                return
            slot, other, rank = int(mine[here]), int(others[there]), int(theirs[there])
            self.take(slot)
            self.take(other)
            self.put(slot, rank)
            self.put(other, busiest)
