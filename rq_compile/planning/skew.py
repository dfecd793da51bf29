"""How unevenly a router spreads tokens over the experts of a layer, and whether texts agree on which of them are busy."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from statistics import fmean

import numpy as np

from rq_compile.calibration.schema import LayerCalibration
from rq_compile.planning import metrics

# The busiest expert of uniformly random routing is a few per cent above the mean with some thousand tokens per expert.
EVEN = 1.05
# Rank correlation of loads below which a plan for one text tells little about another.
AGREEING = 0.5


@dataclass(frozen=True)
class Skew:
    """``lis``: busiest expert divided by the mean. ``gini``: 0 if all loads are equal, ``1 - 1/m`` if one expert has all tokens.
    ``busiest_tenth``: share of the tokens that the busiest tenth of the experts, rounded up, gets. ``agreement``: Spearman's rank
    correlation of the experts' loads, averaged over pairs of texts (the halves of a single text). None: unknown, or all loads are
    equal.
    """

    lis: float
    gini: float
    busiest_tenth: float
    agreement: float | None = None


def skew(load: Sequence[float] | np.ndarray, several: Sequence[Sequence[int]] | np.ndarray = ()) -> Skew:
    """The skew of ``load [m]``, and the agreement of ``several`` loads ``[n, m]``."""
    ordered = np.sort(np.asarray(load, np.float64))
    count, total = len(ordered), ordered.sum()
    if total <= 0:
        return Skew(1.0, 0.0, ceil(count / 10) / count)
    return Skew(
        lis=float(metrics.lis(ordered, count)),
        # Half the mean difference of two experts divided by the mean, from ordered values (Gini 1912).
        gini=float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * total)),
        busiest_tenth=float(ordered[-ceil(count / 10) :].sum() / total),
        agreement=agreement(np.asarray(several)),
    )


def skew_of(layer: LayerCalibration) -> Skew:
    """The skew of a calibrated layer. Agreement is between its texts, or between the first and second half of its only text."""
    several = np.asarray(layer.text_loads)
    if len(several) == 1 and len(layer.batch_loads) > 1:
        batches = np.asarray(layer.batch_loads)
        several = np.stack([half.sum(0) for half in np.array_split(batches, 2)])
    return skew(layer.load, several)


def agreement(several: np.ndarray) -> float | None:
    """Mean rank correlation of pairs of ``several [n, m]`` loads; None if there is no pair in which both vary over the
    experts."""
    varying = [_ranks(loads) for loads in several if np.ptp(loads) > 0]
    told = [float(np.corrcoef(one, other)[0, 1]) for one, other in combinations(varying, 2)]
    return fmean(told) if told else None


def _ranks(loads: np.ndarray) -> np.ndarray:
    """Their ranks ``[m]``. Equal loads share the mean of their ranks, as in Spearman's correlation."""
    _, place, counts = np.unique(loads, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spread(skews: Sequence[Skew]) -> str:
    """Means over the layers, as part of a sentence."""
    lis, gini, tenth = (fmean(getattr(one, name) for one in skews) for name in ("lis", "gini", "busiest_tenth"))
    return (
        f"the busiest expert of a layer gets {lis:.2f} times the mean and the busiest tenth {100 * tenth:.0f} % (Gini {gini:.2f})"
    )


def steadiness(skews: Sequence[Skew]) -> str:
    """Whether a plan for these loads can serve other text, as part of a sentence; empty if this is unknown."""
    known = [one.agreement for one in skews if one.agreement is not None]
    if not known:
        return ""
    correlation = fmean(known)
    if correlation >= AGREEING:
        return f"texts agree on which experts are busy (rank correlation {correlation:.2f})"
    return (
        f"texts differ in which experts are busy (rank correlation {correlation:.2f}), so a plan for one text suits another less"
    )


def outlook(skews: Sequence[Skew]) -> str:
    """Whether replicas can help, by target, in one sentence. Shown for a calibration, before there is a plan."""
    told = "; ".join(filter(None, (spread(skews), steadiness(skews))))
    if fmean(one.lis for one in skews) < EVEN:
        return f"replication cannot help on any target: the load is even ({told})"
    return (
        "replication can help only where the busiest slot or rank sets the time (--target batched or tensorrt-rtx, or several "
        f"--ranks): {told}"
    )
