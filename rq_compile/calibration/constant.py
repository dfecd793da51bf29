"""Experts that one vector replaces: the vector with the least gate-weighted squared error, and this error.

For an expert E with pairs (x, gate), the sum of ``gate**2 * ||E(x) - v||**2`` is least for v the mean of the outputs, weighted by
``gate**2``. It is then the energy, the sum of ``gate**2 * ||E(x)||**2``, minus ``||weighted||**2 / squared_gates``. All of these
are sums over pairs, so that calibrations add up exactly.
"""

import numpy as np


def mean_outputs(weighted: np.ndarray, squared_gates: np.ndarray) -> np.ndarray:
    """``[m, hidden]`` from the sums of ``gate**2 * E(x)``, ``weighted [m, hidden]``, and of ``gate**2``, ``squared_gates [m]``.
    The mean of an expert without any gates is 0."""
    return weighted / np.where(squared_gates > 0, squared_gates, 1)[:, None]


def constant_error(energy: np.ndarray, weighted: np.ndarray, squared_gates: np.ndarray) -> np.ndarray:
    """float64 ``[m]``: the squared error of every expert's mean output, weighted by the squared gates and summed over its
    pairs."""
    means = mean_outputs(weighted.astype(np.float64), squared_gates)
    return np.maximum(0.0, energy - (weighted * means).sum(axis=1))
