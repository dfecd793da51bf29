"""The paper's importance score of an expert (arXiv 2602.19938), computed from Wanda's scores of its weights (arXiv
2306.11695)."""

from math import ceil

import numpy as np
import torch

from rq_compile.quantization.quantizer import torch_tensor

# Wanda's usual sparsity. The score is then the mean over the weights that would be removed by pruning half of the expert.
WANDA_FRACTION = 0.5
SAMPLE = 100_000


def wanda_score(matrices: list[tuple[np.ndarray, np.ndarray]], fraction: float) -> float:
    """The mean of the lowest ``fraction`` of an expert's scores ``|W[i, j]| * ||X[:, j]||_2``.

    Each pair is a matrix ``W [rows, columns]`` and the squared norms ``[columns]`` of its inputs over the expert's
    calibration tokens. The paper does not say which matrices enter: all do, their scores pooled. The fraction's count is
    rounded up. An expert without tokens scores 0.
    """
    scores = torch.empty(sum(weights.size for weights, _ in matrices))
    start = 0
    for weights, norms in matrices:
        part = scores[start : start + weights.size].view(weights.shape)
        torch.mul(torch_tensor(weights).float().abs(), torch.from_numpy(np.sqrt(norms)), out=part)
        start += weights.size
    return _mean_of_lowest(scores, ceil(fraction * len(scores)))


def _mean_of_lowest(scores: torch.Tensor, count: int) -> float:
    """Only what lies between two scores of a sample, around the ``count``-th lowest of all, is looked at in order."""
    sample = np.sort(scores[:: max(1, len(scores) // SAMPLE)].numpy())
    place, reach = count / len(scores) * len(sample), 4 * len(sample) ** 0.5
    # Beyond the sample's ends there may be others.
    low = float(sample[int(place - reach)]) if place >= reach else 0.0
    high = float(sample[int(place + reach)]) if place + reach < len(sample) else np.inf
    below, between = int((scores < low).count_nonzero()), scores[(scores >= low) & (scores <= high)].numpy()
    if not 0 < count - below <= len(between):
        low, below, between = 0.0, 0, scores.numpy()
    between = np.partition(between, count - below - 1)[: count - below]
    # What is not below counts as ``low``.
    total = float(scores.clamp(max=low).sum()) - low * (len(scores) - below)
    return (total + float(between.sum(dtype=np.float64))) / count
