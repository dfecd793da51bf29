"""Which rank holds which expert. Two copies of one expert never share a rank, because this would not relieve any rank.

A layer's slots on ranks are therefore a matrix ``holds``, bool ``[R, m]``. An expert's tokens are split evenly among the ranks
that hold it.
"""

from dataclasses import dataclass

import numpy as np

MOST_MOVES = 500
# A move must lower the busiest rank's load by more than rounding errors.
PROGRESS = 1 - 1e-9


def contiguous(experts: int, ranks: int) -> np.ndarray:
    """The rank of each expert in an expert-parallel layout without a plan, int64 ``[m]``: consecutive blocks of experts."""
    return np.arange(experts) * ranks // experts


def imbalance(demand: np.ndarray, holds: np.ndarray) -> float:
    """Load of the busiest rank divided by the mean, in the text that is served worst. ``demand`` is float ``[texts, m]``."""
    load = rank_loads(demand, holds)
    return float((load.max(axis=1) / load.mean(axis=1)).max())


def rank_loads(demand: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """Load of each rank in each text, float ``[texts, R]``."""
    return (demand / holds.sum(axis=0)) @ holds.T.astype(np.float64)


def pack(demand: np.ndarray, copies: np.ndarray, ranks: int, goal: float = 1.0) -> np.ndarray:
    """``holds`` for ``copies [m]`` of the experts, with the load of the busiest rank in any text as low as possible.

    Every rank holds ``S // ranks`` slots or one more. Slots are first placed by longest processing time first (Graham 1969) under
    the two restrictions. If no expert has a second copy, the layout without a plan is tried too. From each start, while the
    busiest rank is above ``goal`` times the mean, the two slots whose exchange lowers it most are exchanged. The better result is
    returned.

    Raises:
        ValueError: an expert has more copies than there are ranks.
    """
    if copies.max() > ranks:
        raise ValueError(f"expert {copies.argmax()} has {copies.max()} copies, but there are {ranks} ranks")
    starts = [_longest_first(demand / copies, copies, ranks)]
    if (copies == 1).all():
        starts.append(np.arange(ranks)[:, None] == contiguous(len(copies), ranks))
    for holds in starts:
        for _ in range(MOST_MOVES):
            if imbalance(demand, holds) <= goal or (move := best_exchange(demand, holds)) is None:
                break
            move.make(holds)
    return min(starts, key=lambda holds: imbalance(demand, holds))


def copied_anew(demand: np.ndarray, holds: np.ndarray, goal: float) -> np.ndarray:
    """``holds`` with other experts copied, if that balances better than any exchange. Ranks keep their numbers of slots.

    Steepest descent over two kinds of moves, until the busiest rank is at ``goal`` times the mean: either a copy of an expert on
    a rank is replaced by a copy of another expert, or two ranks exchange a slot.
    """
    holds = holds.copy()
    for _ in range(MOST_MOVES):
        load = rank_loads(demand, holds)
        if load.max() <= goal * load.mean(axis=1).max():
            break
        moves = [move for move in (best_exchange(demand, holds), best_replacement(demand, holds)) if move]
        if not moves:
            break
        min(moves, key=lambda move: move.after).make(holds)
    return holds


@dataclass(frozen=True)
class Move:
    """Slots that change: ``(rank, expert it held, expert it holds)``. ``after``: load of the busiest rank after the move."""

    after: float
    slots: tuple[tuple[int, int, int], ...]

    def make(self, holds: np.ndarray) -> None:
        for rank, old, new in self.slots:
            holds[rank, old], holds[rank, new] = False, True


def best_exchange(demand: np.ndarray, holds: np.ndarray) -> Move | None:
    """The exchange between a slot of the busiest rank and a slot of another rank that relieves it most; None if none does."""
    share, load = demand / holds.sum(axis=0), rank_loads(demand, holds)
    worst = load.max(axis=0)
    busiest = int(worst.argmax())
    mine = np.flatnonzero(holds[busiest])
    ranks, others = np.nonzero(holds & ~holds[busiest] & (np.arange(len(holds)) != busiest)[:, None])
    if not len(others):
        return None
    change = share[:, mine, None] - share[:, None, others]
    after = np.maximum((load[:, busiest, None, None] - change).max(axis=0), (load[:, ranks][:, None] + change).max(axis=0))
    after[holds[ranks][:, mine].T] = np.inf
    here, there = np.unravel_index(after.argmin(), after.shape)
    if after[here, there] >= worst[busiest] * PROGRESS:
        return None
    given, taken = int(mine[here]), int(others[there])
    return Move(float(after[here, there]), ((busiest, given, taken), (int(ranks[there]), taken, given)))


def best_replacement(demand: np.ndarray, holds: np.ndarray, size: np.ndarray | None = None, room: int = 0) -> Move | None:
    """The replacement of a copy of one expert by a copy of another, on any rank, that relieves the busiest rank most, or None.

    If ``size [m]``, the bytes of an expert, is given, only replacements that take at most ``room`` more bytes are considered.
    """
    copies, load = holds.sum(axis=0), rank_loads(demand, holds)
    best, found = load.max() * PROGRESS, None
    for rank in range(len(holds)):
        out = np.flatnonzero(holds[rank] & (copies > 1))
        into = np.flatnonzero(~holds[rank] & (copies < len(holds)))
        if not len(out) or not len(into):
            continue
        without, beside = holds[:, out].copy(), holds[:, into].copy()
        without[rank], beside[rank] = False, True
        # The experts' loads on the ranks after the replacement, minus those before, [texts, R, experts].
        lost = _brought(demand, without, out) - _brought(demand, holds[:, out], out)
        won = _brought(demand, beside, into) - _brought(demand, holds[:, into], into)
        after = (load[:, :, None, None] + lost[..., :, None] + won[..., None, :]).max(axis=(0, 1))
        if size is not None:
            after[size[into][None] - size[out][:, None] > room] = np.inf
        old, new = np.unravel_index(after.argmin(), after.shape)
        if after[old, new] < best:
            best, found = float(after[old, new]), (rank, int(out[old]), int(into[new]))
    return None if found is None else Move(best, (found,))


def _brought(demand: np.ndarray, holds: np.ndarray, experts: np.ndarray) -> np.ndarray:
    return demand[:, None, experts] * holds[None] / holds.sum(axis=0)


def _longest_first(share: np.ndarray, copies: np.ndarray, ranks: int) -> np.ndarray:
    holds = np.zeros((ranks, len(copies)), bool)
    load = np.zeros((len(share), ranks))
    slots = np.repeat(np.arange(len(copies)), copies)
    least, more = divmod(len(slots), ranks)
    for expert in slots[np.argsort(-share.max(axis=0)[slots], kind="stable")]:
        held = holds.sum(axis=1)
        # Only S mod R ranks may hold one slot more than the others.
        room = held < (least + 1 if (held > least).sum() < more else least)
        free = room & ~holds[:, expert]
        if free.any():
            rank = int(np.where(free, (load + share[:, expert, None]).max(axis=0), np.inf).argmin())
        else:
            # All ranks with room hold the expert. A rank without it is full, so it has an expert that they lack and can hand it
            # over.
            rank, there = int(np.flatnonzero(~holds[:, expert])[0]), int(np.flatnonzero(room)[0])
            moved = int(np.flatnonzero(holds[rank] & ~holds[there])[0])
            _move(share, holds, load, moved, rank, there)
        holds[rank, expert] = True
        load[:, rank] += share[:, expert]
    return holds


def _move(share: np.ndarray, holds: np.ndarray, load: np.ndarray, expert: int, rank: int, to: int) -> None:
    holds[rank, expert], holds[to, expert] = False, True
    load[:, rank] -= share[:, expert]
    load[:, to] += share[:, expert]
