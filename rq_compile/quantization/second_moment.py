"""Statistics of the inputs of a weight matrix for a quantizer: their second moment on the calibration text, as an additive
sum."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch

from rq_compile.processes import world

# Fraction of the mean diagonal that is added to it, so that directions with few calibration tokens do not count as free of error.
DAMPING = 0.01
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """``values`` fp32: the sum of ``x x^T`` over inputs x. Either the whole moment ``[columns, columns]``, or only the parts
    within blocks of columns, ``[blocks, block, block]`` (the last one padded with zeros), which are ``columns / block`` times
    smaller.
    """

    values: np.ndarray
    _by_block: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @property
    def whole(self) -> bool:
        return self.values.ndim == 2

    def feedback(self, block: int) -> np.ndarray:
        """The factors by which GPTQ adds a column's rounding error to the following columns: fp32 ``[parts, blocks, columns,
        block]``.

        A part consists of the columns that compensate for each other: all columns, or those of one block of the moment, padded
        to whole blocks of ``block`` columns. For each of these blocks, there are the factors of all columns of the part.
        """
        return self._prepared(block)[0]

    def importance(self, block: int) -> np.ndarray:
        """fp32 ``[parts * blocks * block]``: the damped diagonal, in units of its mean; 0 for padding."""
        return self._prepared(block)[1]

    def _prepared(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Computed once for all threads."""
        with self._lock:
            if block not in self._by_block:
                self._by_block[block] = self._prepare(block)
            return self._by_block[block]

    def _prepare(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        moments = self.values.astype(np.float64).reshape(-1, *self.values.shape[-2:])
        columns = moments.shape[-1]
        width = columns + -columns % block
        mean = float(moments.diagonal(axis1=1, axis2=2).mean())
        # Without any tokens, all inputs have the same weight.
        moments = moments / mean if mean > 0 else moments
        moments[:, range(columns), range(columns)] += DAMPING if mean > 0 else 1.0
        # The factor U of the moment's inverse, U^T U, is the inverse of the factor R of the moment, R R^T, both upper
        # triangular; R, in reverse order, is the lower factor of the moment in reverse order.
        with _one_thread():
            factor = torch.linalg.cholesky(torch.from_numpy(moments).flip(1, 2)).flip(1, 2)
            upper = torch.linalg.solve_triangular(factor, torch.eye(columns, dtype=torch.float64), upper=True).numpy()
        feedback = np.zeros((len(moments), width, width), np.float32)
        feedback[:, :columns, :columns] = upper / upper.diagonal(axis1=1, axis2=2)[..., None]
        feedback = feedback.reshape(len(moments), width, width // block, block).transpose(0, 2, 1, 3)
        importance = np.pad(moments.diagonal(axis1=1, axis2=2), ((0, 0), (0, width - columns)))
        return np.ascontiguousarray(feedback), importance.astype(np.float32).ravel()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: LAPACK rounds differently with other numbers of threads, but an engine must not depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def whole_moment(inputs: np.ndarray) -> SecondMoment:
    """The moment of fp32 ``inputs [n, columns]`` (which may be mapped from disk); zeros without inputs. The inputs are the same
    on every process of the world, and each process multiplies some of them."""
    # In float64, the order of the sum, and thus the number of processes, does not affect the fp32 result.
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    starts = range(0, len(inputs), ROWS_AT_ONCE)
    for start in world().own(world().owners([1] * len(starts)), starts):
        some = torch.from_numpy(np.array(inputs[start : start + ROWS_AT_ONCE]))
        total += some.mT @ some
    return SecondMoment(world().sum(total.numpy()).astype(np.float32))


def block_products(inputs: np.ndarray, block: int) -> np.ndarray:
    """Sum of ``x x^T`` over ``inputs [n, columns]`` within blocks of columns, the last one padded: ``[blocks, block, block]``."""
    filled = torch.nn.functional.pad(torch.from_numpy(inputs), (0, -inputs.shape[1] % block))
    # With torch's threads, like the steps before and after. numpy's threads would keep the cores busy while they wait.
    blocks = filled.reshape(len(inputs), -1, block).transpose(0, 1)
    return torch.bmm(blocks.mT, blocks).numpy()


def block_moment(inputs: np.ndarray, block: int) -> SecondMoment:
    """The moment of fp32 ``inputs [n, columns]`` within blocks of ``block`` columns."""
    return SecondMoment(block_products(inputs, block))
