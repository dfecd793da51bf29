"""Measures of balance: every number that a plan or an evaluation reports about loads, each defined once.

Loads are (token, choice) pairs, with padding masked. All functions accept leading axes (texts, batches), so one definition
serves both pooled counts and the distribution over batches.
"""

from collections.abc import Sequence

import numpy as np

from rq_compile.planning.schema import Slot


def copy_numbers(experts: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For slots with ``experts [S]``: each slot's number among its expert's copies, and how many copies there are, int64
    ``[S]``."""
    held = np.asarray(experts, np.int64)
    order = np.argsort(held, kind="stable")
    first = np.searchsorted(held[order], held[order])
    number = np.empty_like(held)
    number[order] = np.arange(len(held)) - first
    return number, np.bincount(held)[held]


def slot_loads(loads: np.ndarray, experts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Rows per slot, int64 ``[..., S]``, from rows per logical expert, ``loads [..., m]``, as the op Dispatch distributes them.

    The tokens of an expert take its slots in turn, in arrival order. The first ``n mod c`` of its c slots hold one row more than
    the others, so the loads differ by at most one token.
    """
    number, copies = copy_numbers(experts)
    rows = np.asarray(loads, np.int64)[..., np.asarray(experts, np.int64)]
    return (rows - number + copies - 1) // copies


def of_computed(slots: Sequence[Slot], slot_rows: np.ndarray) -> tuple[list[Slot], np.ndarray]:
    """The ``slots`` that compute, and their rows ``[..., computed]`` from ``slot_rows [..., S]``. Slots in ``constant`` have no
    load to balance: all measures of balance leave them out, in the busiest as well as in the mean."""
    computed = [place for place, slot in enumerate(slots) if slot.computed]
    return [slots[place] for place in computed], slot_rows[..., computed]


def rank_loads(slot_rows: np.ndarray, ranks_of_slots: Sequence[int] | np.ndarray, ranks: int) -> np.ndarray:
    """Rows per rank ``[..., R]``, from rows per slot ``[..., S]``."""
    membership = np.asarray(ranks_of_slots)[:, None] == np.arange(ranks)
    return slot_rows @ membership.astype(slot_rows.dtype)


def lis(slot_rows: np.ndarray, experts: int) -> np.ndarray:
    """Load imbalance score (arXiv 2602.19938): busiest slot divided by the equal share of the m logical ``experts``, ``[...]``.

    Slots beyond m do not lower the share, and a score below 1 counts as 1, so that duplicating everything gains nothing. Without
    any rows, the score is 1.
    """
    return np.maximum(1.0, _over_mean(slot_rows, experts))


def strict_lis(slot_rows: np.ndarray) -> np.ndarray:
    """Busiest slot divided by the mean of the S slots, ``[...]``. With a batched lowering of one capacity, this is the number of
    computed rows divided by the useful rows."""
    return np.maximum(1.0, _over_mean(slot_rows, slot_rows.shape[-1]))


def rank_imbalance(rank_rows: np.ndarray) -> np.ndarray:
    """Busiest rank divided by the mean rank, ``[...]``. The step time of an expert-parallel layer is proportional to it."""
    return np.maximum(1.0, _over_mean(rank_rows, rank_rows.shape[-1]))


def balancedness(rank_rows: np.ndarray) -> np.ndarray:
    """Mean rank divided by the busiest rank, ``[...]``, as vLLM logs it. 1 is perfect, 1/R is the worst."""
    return 1.0 / rank_imbalance(rank_rows)


def padded_work(slot_rows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Rows that a batched lowering computes, divided by the useful rows, ``[...]``.

    Every slot is a lane as wide as the busiest slot of its product (``lanes [S]``: see ``capacity.lane_groups``).
    """
    members = [lanes == number for number in np.unique(lanes)]
    computed = sum(slot_rows[..., mine].max(axis=-1) * mine.sum() for mine in members)
    total = slot_rows.sum(axis=-1)
    return np.where(total > 0, computed / np.maximum(total, 1), 1.0)


def excess_removed(before: float, after: float) -> float:
    """Fraction of the excess imbalance ``before - 1`` that ``after`` no longer has; 1 if there was none."""
    return 1.0 if before <= 1.0 else (before - after) / (before - 1.0)


def over_batches(batch_loads: np.ndarray, batches: int) -> np.ndarray:
    """Loads ``[B // batches, m]`` of larger batches, each made of ``batches`` consecutive calibration batches ``[B, m]``.

    Remaining batches are dropped. This gives the distribution of a metric over batches of 32 or 128 sequences from calibration
    batches of 8 or 1.
    """
    whole = len(batch_loads) // batches * batches
    return batch_loads[:whole].reshape(-1, batches, batch_loads.shape[-1]).sum(axis=1)


def _over_mean(rows: np.ndarray, share_of: int) -> np.ndarray:
    if not rows.shape[-1]:
        return np.ones(rows.shape[:-1])
    total = rows.sum(axis=-1)
    return np.where(total > 0, rows.max(axis=-1) * share_of / np.where(total > 0, total, 1), 1.0)
