"""The paper's importance score of an expert (arXiv 2602.19938), computed from Wanda's scores of its weights (arXiv
2306.11695)."""

from math import ceil

import numpy as np

from rq_compile.quantization.quantizer import torch_tensor
from rq_compile.quantization.weight_sums import lowest_scores

# Wanda's usual sparsity. The score is then the mean over the weights that would be removed by pruning half of the expert.
WANDA_FRACTION = 0.5
SAMPLE = 100_000
# The place of a score in the sample has a standard deviation of at most half of the square root of the sample's size.
REACH = 2.5


def wanda_score(matrices: list[tuple[np.ndarray, np.ndarray]], fraction: float) -> float:
    """The mean of the lowest ``fraction`` of an expert's scores ``|W[i, j]| * ||X[:, j]||_2``.

    Each pair is a matrix ``W [rows, columns]`` and the squared norms ``[columns]`` of its inputs over the expert's
    calibration tokens. The paper does not say which matrices enter: all do, their scores pooled. The fraction's count is
    rounded up. An expert without tokens scores 0.
    """
    factors = [(torch_tensor(weights).float().numpy(), np.sqrt(norms)) for weights, norms in matrices]
    total = sum(weights.size for weights, _ in factors)
    count = ceil(fraction * total)
    sample = np.concatenate([_sample(*pair, max(1, total // SAMPLE)) for pair in factors])
    place, reach = count / total * len(sample), REACH * len(sample) ** 0.5
    # Beyond the sample's ends there may be others.
    low = float(np.partition(sample, int(place - reach))[int(place - reach)]) if place >= reach else 0.0
    high = float(np.partition(sample, int(place + reach))[int(place + reach)]) if place + reach < len(sample) else np.inf
    lowest = _mean_of_lowest(factors, count, low, high)
    if lowest is None:
        lowest = _mean_of_lowest(factors, count, 0.0, np.inf)
    assert lowest is not None
    return lowest


Factors = tuple[np.ndarray, np.ndarray]


def _sample(weights: np.ndarray, norms: np.ndarray, step: int) -> np.ndarray:
    """Every ``step``-th score of a matrix."""
    chosen = np.arange(0, weights.size, step)
    return np.abs(weights.reshape(-1)[chosen] * norms[chosen % weights.shape[1]])


def _mean_of_lowest(factors: list[Factors], count: int, low: float, high: float) -> float | None:
    """Only the scores from ``low`` to ``high`` are put in order; None if the ``count``-th lowest is not among them."""
    belows, sums, nears = zip(*(lowest_scores(*pair, low, high) for pair in factors), strict=True)
    below, between = sum(belows), np.concatenate(nears)
    if not 0 < count - below <= len(between):
        return None
    lowest = np.partition(between, count - below - 1)[: count - below].sum(dtype=np.float64)
    return (sum(sums) + float(lowest)) / count
