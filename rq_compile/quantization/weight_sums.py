"""Sums over the weights of a matrix, which a calibration needs of every expert. ``plugins/quantizer`` computes them in one pass
over the weights."""

import ctypes

import numpy as np

from rq_compile.quantization.library import quantizer_function


def squared_difference(some: np.ndarray, others: np.ndarray | None = None, threads: int = 1) -> float:
    """Sum over ``(some - others)**2`` of fp32 matrices ``[rows, columns]``; without ``others``, of the squares of ``some``.

    Differences are in fp32, sums in float64. They do not depend on the number of ``threads``.
    """
    some = np.ascontiguousarray(some, np.float32)
    others = None if others is None else np.ascontiguousarray(others, np.float32)
    squares = np.empty(len(some), np.float64)
    quantizer_function("rq_squared_differences")(
        *(_data(some), _data(others), *map(ctypes.c_int64, some.shape), _data(squares), threads)
    )
    return float(squares.sum())


def squared_half_error(weights: np.ndarray, threads: int = 1) -> float:
    """``squared_difference`` of fp32 ``weights [rows, columns]`` and their values in fp16, infinite beyond its range."""
    weights = np.ascontiguousarray(weights, np.float32)
    squares = np.empty(len(weights), np.float64)
    quantizer_function("rq_squared_half_errors")(*(_data(weights), *map(ctypes.c_int64, weights.shape), _data(squares), threads))
    return float(squares.sum())


def lowest_scores(weights: np.ndarray, norms: np.ndarray, low: float, high: float) -> tuple[int, float, np.ndarray]:
    """Of the scores ``|weights[i, j]| * norms[j]``, all fp32: how many are below ``low``, their sum, and those from ``low`` to
    ``high`` as an array."""
    weights, norms = np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(norms, np.float32)
    between = np.empty(weights.size, np.float32)
    below, total = ctypes.c_int64(), ctypes.c_double()
    find = quantizer_function("rq_lowest_scores")
    find.restype = ctypes.c_int64
    found = find(
        *(_data(weights), _data(norms), *map(ctypes.c_int64, weights.shape), ctypes.c_float(low), ctypes.c_float(high)),
        *(_data(between), ctypes.byref(below), ctypes.byref(total)),
    )
    return below.value, total.value, between[:found].copy()


def _data(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
