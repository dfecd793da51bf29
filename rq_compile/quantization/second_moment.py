"""What a quantizer knows of the inputs of a weight matrix: their second moment on the calibration text."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Of the mean diagonal, added to it: directions that few calibration tokens took must not count as free of error.
DAMPING = 0.01
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """``values`` fp32: mean of ``x x^T`` over inputs x, whole ``[columns, columns]``, or only what the columns of one
    block share, ``[blocks, block, block]`` (the last one filled up with zeros): ``columns / block`` times smaller.
    """

    values: np.ndarray

    @property
    def whole(self) -> bool:
        return self.values.ndim == 2

    @cached_property
    def damped(self) -> np.ndarray:
        """Float64, of the shape of ``values``."""
        # Without any token all inputs weigh alike.
        damping = DAMPING * float(self.values.diagonal(axis1=-2, axis2=-1).mean()) or 1.0
        return self.values.astype(np.float64) + damping * np.eye(self.values.shape[-1])

    @cached_property
    def inverse_factor(self) -> np.ndarray:
        """The upper Cholesky factor U of the damped moment's inverse, ``U^T U``, float64, of the shape of ``values``."""
        return np.linalg.cholesky(np.linalg.inv(self.damped), upper=True)


def whole_moment(inputs: np.ndarray) -> SecondMoment:
    """Of ``inputs [n, columns]`` fp32 (may be mapped from disk); zeros without any."""
    total = np.zeros((inputs.shape[1], inputs.shape[1]), np.float32)
    for start in range(0, len(inputs), ROWS_AT_ONCE):
        some = inputs[start : start + ROWS_AT_ONCE]
        total += some.T @ some
    return SecondMoment(total / np.float32(max(1, len(inputs))))


def block_products(inputs: np.ndarray, block: int) -> np.ndarray:
    """Sum of ``x x^T`` over ``inputs [n, columns]``, by blocks of columns, the last one filled up: ``[blocks, block, block]``."""
    blocks = -(-inputs.shape[1] // block)
    filled = np.pad(inputs, ((0, 0), (0, -inputs.shape[1] % block))).reshape(len(inputs), blocks, block).transpose(1, 0, 2)
    return filled.transpose(0, 2, 1) @ filled


def block_moment(inputs: np.ndarray, block: int) -> SecondMoment:
    """Of ``inputs [n, columns]`` fp32, by blocks of ``block`` columns."""
    return SecondMoment(block_products(inputs, block) / np.float32(max(1, len(inputs))))
