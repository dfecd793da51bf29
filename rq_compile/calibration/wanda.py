"""The paper's importance score of an expert (arXiv 2602.19938), computed from Wanda's scores of its weights (arXiv
2306.11695)."""

from collections.abc import Iterator
from math import ceil

import numpy as np
import torch

from rq_compile.quantization.quantizer import torch_tensor

# Wanda's usual sparsity. The score is then the mean over the weights that would be removed by pruning half of the expert.
WANDA_FRACTION = 0.5
SAMPLE = 100_000
# Scores that are looked at at a time.
AT_ONCE = 1 << 17


def wanda_score(matrices: list[tuple[np.ndarray, np.ndarray]], fraction: float) -> float:
    """The mean of the lowest ``fraction`` of an expert's scores ``|W[i, j]| * ||X[:, j]||_2``.

    Each pair is a matrix ``W [rows, columns]`` and the squared norms ``[columns]`` of its inputs over the expert's
    calibration tokens. The paper does not say which matrices enter: all do, their scores pooled. The fraction's count is
    rounded up. An expert without tokens scores 0.
    """
    factors = [(torch_tensor(weights), torch.from_numpy(np.sqrt(norms))) for weights, norms in matrices]
    total = sum(weights.numel() for weights, _ in factors)
    count = ceil(fraction * total)
    sample = np.sort(np.concatenate([_sample(*pair, max(1, total // SAMPLE)) for pair in factors]))
    place, reach = count / total * len(sample), 4 * len(sample) ** 0.5
    # Beyond the sample's ends there may be others.
    low = float(sample[int(place - reach)]) if place >= reach else 0.0
    high = float(sample[int(place + reach)]) if place + reach < len(sample) else np.inf
    lowest = _mean_of_lowest(factors, count, low, high)
    if lowest is None:
        lowest = _mean_of_lowest(factors, count, 0.0, np.inf)
    assert lowest is not None
    return lowest


Factors = tuple[torch.Tensor, torch.Tensor]


def _sample(weights: torch.Tensor, norms: torch.Tensor, step: int) -> np.ndarray:
    """Every ``step``-th score of a matrix."""
    chosen = torch.arange(0, weights.numel(), step)
    return (weights.reshape(-1)[chosen].float() * norms[chosen % weights.shape[1]]).abs_().numpy()


def _scores(factors: list[Factors]) -> Iterator[torch.Tensor]:
    """Of all matrices, so many at a time that they stay in a cache."""
    for weights, norms in factors:
        for rows in weights.split(max(1, AT_ONCE // weights.shape[1])):
            yield (rows.float() * norms).abs_().ravel()


def _mean_of_lowest(factors: list[Factors], count: int, low: float, high: float) -> float | None:
    """Only the scores from ``low`` to ``high`` are put in order; None if the ``count``-th lowest is not among them."""
    below, total = 0, 0.0
    near: list[np.ndarray] = []
    for scores in _scores(factors):
        lower = scores < low
        some = int(lower.count_nonzero())
        # What is not below counts as ``low``.
        total += float(scores.clamp(max=low).sum()) - low * (len(scores) - some)
        below += some
        near.append(scores[(scores > high).logical_or_(lower).logical_not_()].numpy())
    between = np.concatenate(near)
    if not 0 < count - below <= len(between):
        return None
    # Without any below, what is left of their sum is rounding.
    lowest = np.partition(between, count - below - 1)[: count - below].sum(dtype=np.float64)
    return ((total if below else 0.0) + float(lowest)) / count
