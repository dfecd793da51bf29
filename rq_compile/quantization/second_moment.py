"""What a quantizer knows of the inputs of a weight matrix: their second moment on the calibration text, a sum that adds up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch

from rq_compile.processes import world

# Of the mean diagonal, added to it: directions that few calibration tokens took must not count as free of error.
DAMPING = 0.01
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """``values`` fp32: the sum of ``x x^T`` over inputs x, whole ``[columns, columns]``, or only what the columns of one
    block share, ``[blocks, block, block]`` (the last one filled up with zeros): ``columns / block`` times smaller.
    """

    values: np.ndarray
    _by_block: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @property
    def whole(self) -> bool:
        return self.values.ndim == 2

    def feedback(self, block: int) -> np.ndarray:
        """What GPTQ adds of a column's rounding error to the columns after it: fp32 ``[parts, blocks, columns, block]``.

        A part is what columns that are rounded with a look at each other make up: all, or those of one block of the moment; it
        is filled up to whole blocks of ``block`` columns. For each of these, there are the factors of all columns of the part.
        """
        return self._prepared(block)[0]

    def importance(self, block: int) -> np.ndarray:
        """fp32 ``[parts * blocks * block]``: the diagonal, damped, in units of its mean; 0 where it is filled up."""
        return self._prepared(block)[1]

    def _prepared(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Once for all threads."""
        with self._lock:
            if block not in self._by_block:
                self._by_block[block] = self._prepare(block)
            return self._by_block[block]

    def _prepare(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        moments = self.values.astype(np.float64).reshape(-1, *self.values.shape[-2:])
        columns = moments.shape[-1]
        width = columns + -columns % block
        mean = float(moments.diagonal(axis1=1, axis2=2).mean())
        # Without any token all inputs weigh alike.
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
    """LAPACK rounds differently on another number of threads, and an engine must not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def whole_moment(inputs: np.ndarray) -> SecondMoment:
    """Of ``inputs [n, columns]`` fp32 (may be mapped from disk), the same on every process of the world, each of which
    multiplies some of them; zeros without any."""
    # In float64 the order of a sum, and so the number of processes, changes nothing that fp32 shows.
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    starts = range(0, len(inputs), ROWS_AT_ONCE)
    for start in world().own(world().owners([1] * len(starts)), starts):
        some = torch.from_numpy(np.array(inputs[start : start + ROWS_AT_ONCE]))
        total += some.mT @ some
    return SecondMoment(world().sum(total.numpy()).astype(np.float32))


def block_products(inputs: np.ndarray, block: int) -> np.ndarray:
    """Sum of ``x x^T`` over ``inputs [n, columns]``, by blocks of columns, the last one filled up: ``[blocks, block, block]``."""
    filled = torch.nn.functional.pad(torch.from_numpy(inputs), (0, -inputs.shape[1] % block))
    # torch's threads, as what comes before and after: numpy's would keep the cores busy for a while, waiting for more.
    blocks = filled.reshape(len(inputs), -1, block).transpose(0, 1)
    return torch.bmm(blocks.mT, blocks).numpy()


def block_moment(inputs: np.ndarray, block: int) -> SecondMoment:
    """Of ``inputs [n, columns]`` fp32, by blocks of ``block`` columns."""
    return SecondMoment(block_products(inputs, block))
