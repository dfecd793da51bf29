"""Which rank holds which expert. Two copies of one expert never share a rank: a copy beside its original relieves nobody.

So a layer's slots on ranks are a matrix, ``holds`` bool ``[R, m]``; an expert's tokens are split evenly among the ranks that hold
it.
"""

import numpy as np

MOST_MOVES = 500
# A move must lower the busiest rank's load by more than rounding could.
PROGRESS = 1 - 1e-9


def contiguous(experts: int, ranks: int) -> np.ndarray:
    """Expert-parallel layout without a plan, int64 ``[m]``: every rank holds a block of consecutive experts."""
    return np.arange(experts) * ranks // experts


def imbalance(demand: np.ndarray, holds: np.ndarray) -> float:
    """Load of the busiest rank over the mean rank's, in the text that is served worst. ``demand`` float ``[texts, m]``."""
    load = rank_loads(demand, holds)
    return float((load.max(axis=1) / load.mean(axis=1)).max())


def rank_loads(demand: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """float ``[texts, R]``."""
    return (demand / holds.sum(axis=0)) @ holds.T.astype(np.float64)


def pack(demand: np.ndarray, copies: np.ndarray, ranks: int, goal: float = 1.0) -> np.ndarray:
    """Ranks for ``copies [m]`` of the experts such that the busiest rank of any text is as little busy as possible; ``holds``.

    Every rank holds ``S // ranks`` slots or one more. Longest processing time first (Graham 1969), with the two restrictions;
    then, while the busiest rank is above ``goal`` times the mean, the exchange of two slots that lowers it most.

    Raises:
        ValueError: an expert has more copies than there are ranks.
    """
    if copies.max() > ranks:
        raise ValueError(f"expert {copies.argmax()} has {copies.max()} copies, but there are {ranks} ranks")
    share = demand / copies
    holds = _longest_first(share, copies, ranks)
    load = share @ holds.T.astype(np.float64)
    for _ in range(MOST_MOVES):
        if not _exchange(share, holds, load, goal * load.mean(axis=1).max()):
            break
    return holds


def copied_anew(demand: np.ndarray, holds: np.ndarray, goal: float) -> np.ndarray:
    """``holds`` with other experts copied, as many slots on every rank, where that balances better than any exchange.

    Steepest descent over two moves, until the busiest rank is at ``goal`` times the mean: on one rank, a copy of an expert is
    replaced by a copy of another; two ranks exchange a slot.
    """
    holds = holds.copy()
    for _ in range(MOST_MOVES):
        copies = holds.sum(axis=0)
        load = rank_loads(demand, holds)
        bar = goal * load.mean(axis=1).max()
        if load.max() <= bar or not (_exchange(demand / copies, holds, load, bar) or _substitute(demand, copies, holds, load)):
            break
    return holds


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
            # All with room hold the expert. One that does not is full, so it has an expert to hand over that they lack.
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


def _exchange(share: np.ndarray, holds: np.ndarray, load: np.ndarray, bar: float) -> bool:
    """The best exchange of an expert of the busiest rank for one of another; False if none helps or the load is at ``bar``."""
    worst = load.max(axis=0)
    busiest = int(worst.argmax())
    if worst[busiest] <= bar:
        return False
    mine = np.flatnonzero(holds[busiest])
    ranks, others = np.nonzero(holds & ~holds[busiest] & (np.arange(len(holds)) != busiest)[:, None])
    if not len(others):
        return False
    change = share[:, mine, None] - share[:, None, others]
    after = np.maximum((load[:, busiest, None, None] - change).max(axis=0), (load[:, ranks][:, None] + change).max(axis=0))
    after[holds[ranks][:, mine].T] = np.inf
    here, there = np.unravel_index(after.argmin(), after.shape)
    if after[here, there] >= worst[busiest] * PROGRESS:
        return False
    rank, given, taken = int(ranks[there]), int(mine[here]), int(others[there])
    _move(share, holds, load, given, busiest, rank)
    _move(share, holds, load, taken, rank, busiest)
    return True


def _substitute(demand: np.ndarray, copies: np.ndarray, holds: np.ndarray, load: np.ndarray) -> bool:
    """The best replacement, on any rank, of a copy of one expert by a copy of another; False if none helps."""
    ranks = len(holds)
    best, found = load.max() * PROGRESS, None
    for rank in range(ranks):
        out = np.flatnonzero(holds[rank] & (copies > 1))
        into = np.flatnonzero(~holds[rank] & (copies < ranks))
        if not len(out) or not len(into):
            continue
        without, beside = holds[:, out].copy(), holds[:, into].copy()
        without[rank], beside[rank] = False, True
        # Loads that the experts bring to the ranks, [texts, R, experts], after less before.
        lost = _brought(demand, without, out) - _brought(demand, holds[:, out], out)
        won = _brought(demand, beside, into) - _brought(demand, holds[:, into], into)
        after = (load[:, :, None, None] + lost[..., :, None] + won[..., None, :]).max(axis=(0, 1))
        old, new = np.unravel_index(after.argmin(), after.shape)
        if after[old, new] < best:
            best, found = after[old, new], (rank, int(out[old]), int(into[new]))
    if found is None:
        return False
    rank, old_expert, new_expert = found
    holds[rank, old_expert], holds[rank, new_expert] = False, True
    return True


def _brought(demand: np.ndarray, holds: np.ndarray, experts: np.ndarray) -> np.ndarray:
    return demand[:, None, experts] * holds[None] / holds.sum(axis=0)
