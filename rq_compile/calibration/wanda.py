"""The paper's importance score of an expert (arXiv 2602.19938), made of Wanda's scores of its weights (arXiv 2306.11695)."""

from math import ceil

import numpy as np

# Wanda's usual sparsity: the score is then the mean over the weights that pruning the expert to one half would remove.
WANDA_FRACTION = 0.5


def wanda_score(matrices: list[tuple[np.ndarray, np.ndarray]], fraction: float) -> float:
    """The mean of the lowest ``fraction`` of an expert's scores ``|W[i, j]| * ||X[:, j]||_2``.

    Each pair is a matrix ``W [rows, columns]`` and the squared norms ``[columns]`` of its inputs over the expert's
    calibration tokens. The paper does not say which matrices enter: all do, their scores pooled. The fraction's count is
    rounded up. An expert without tokens scores 0.
    """
    scores = np.empty(sum(weights.size for weights, _ in matrices), np.float32)
    start = 0
    for weights, norms in matrices:
        part = scores[start : start + weights.size].reshape(weights.shape)
        np.multiply(np.abs(weights, dtype=np.float32), np.sqrt(norms), out=part)
        start += weights.size
    lowest = ceil(fraction * scores.size)
    scores.partition(lowest - 1)
    return float(scores[:lowest].mean(dtype=np.float64))
