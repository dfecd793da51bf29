"""What GPTQ adds of a column's rounding error to the columns after it (Frantar et al., arXiv 2210.17323, Algorithm 1), from the
second moment of a matrix's inputs."""

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from rq_compile.processes import on_this_host
from rq_compile.quantization.library import quantizer_function
from rq_compile.standalone.limits import default_threads

# Fraction of the mean diagonal that is added to it, so that directions with few calibration tokens do not count as free of error.
DAMPING = 0.01
# Columns of a triangular matrix that are computed at a time. Each product of such blocks is computed on one thread: BLAS and
# LAPACK round differently with other numbers of threads, but an engine must not depend on them.
COLUMNS_AT_ONCE = 256
# The integers that stand for factors go up to ``kGreatestFactor`` of plugins/quantizer/src/gptq.h, and are stored with
# ``kFactorOffset`` added.
GREATEST = 31
OFFSET = 32


@dataclass(frozen=True, eq=False)
class Feedback:
    """What GPTQ adds of a column's rounding error to the columns after it, that have ``block`` columns a scale.

    A part is what columns that are rounded with a look at each other make up: all, or those of one block of the moment; it is
    filled up to whole blocks of ``block`` columns. ``within`` fp32 ``[parts, blocks, block, block]`` has the factors of the
    columns of a block for each other. ``across`` uint8 ``[parts, blocks, blocks, block / 4, block / 4, 4, 4]`` has, for the
    columns of each block, four by four, those of the columns of every earlier block, also four by four, plus ``OFFSET``. They
    count ``units`` fp32 ``[parts, blocks, blocks, block]``, which each column of a block has for the factors of every block.
    These are divided by ``balance`` fp32 ``[parts, blocks * block]``, with which the errors of the earlier columns are
    multiplied. ``importance`` fp32 ``[parts * blocks * block]`` is the diagonal of the moment, damped, in units of its mean; 0
    where it is filled up.
    """

    within: np.ndarray
    across: np.ndarray
    units: np.ndarray
    balance: np.ndarray
    importance: np.ndarray

    @property
    def blocks(self) -> int:
        """The blocks of all parts."""
        parts, blocks = self.across.shape[:2]
        return int(parts * blocks)


def feedback_of(moment: np.ndarray, block: int) -> Feedback:
    """The feedback of the fp32 ``moment [columns, columns]`` or, of parts of the columns, ``[parts, columns, columns]``."""
    # The factor U of the moment's inverse, U^T U, is the inverse of the factor R of the moment, R R^T, both upper triangular; R,
    # in reverse order, is the lower factor of the moment in reverse order.
    reverse = moment.reshape(-1, *moment.shape[-2:])[:, ::-1, ::-1].astype(np.float64)
    parts, columns = reverse.shape[:2]
    width = columns + -columns % block
    mean = float(reverse.diagonal(axis1=1, axis2=2).mean())
    # Without any tokens, all inputs have the same weight.
    if mean > 0:
        reverse /= mean
    reverse[:, range(columns), range(columns)] += DAMPING if mean > 0 else 1.0
    importance = np.pad(reverse.diagonal(axis1=1, axis2=2)[:, ::-1], ((0, 0), (0, width - columns)))
    upper = _inverse_factor(torch.from_numpy(reverse)).numpy()[:, ::-1, ::-1]
    diagonal = upper.diagonal(axis1=1, axis2=2)
    factors = np.zeros((parts, width, width), np.float32)
    np.divide(upper, diagonal[..., None], out=factors[:, :columns, :columns], casting="same_kind")
    # An input much larger than the others has much larger factors. Errors and factors each take half of the difference, so that
    # few bits of either suffice.
    balance = np.ones((parts, width // block, block), np.float32)
    balance.reshape(parts, width)[:, :columns] = diagonal**-0.5
    balance = (balance / balance.max(axis=2, keepdims=True)).reshape(parts, width)
    within = np.stack([factors[:, start : start + block, start : start + block] for start in range(0, width, block)], 1)
    across, units = _rounded_factors(factors, balance, block)
    return Feedback(within, across, units, balance, importance.astype(np.float32).ravel())


def _rounded_factors(factors: np.ndarray, balance: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """``Feedback.across`` and ``units``, of the ``factors [parts, width, width]`` of columns for later ones and the ``balance``.

    Factors are rounded as GPTQ rounds weights: the columns that follow compensate for what the rounding for a column changes.
    """
    parts, width, _ = factors.shape
    blocks = width // block
    across = np.full((parts, blocks, blocks, block // 4, block // 4, 4, 4), OFFSET, np.uint8)
    units = np.zeros((parts, blocks, blocks, block), np.float32)
    if blocks == 1:
        return across, units
    given, results = ([array.ctypes.data for array in arrays] for arrays in ((factors, balance), (across, units)))
    arguments = _Factors(*given, parts, width, block, *results)
    if quantizer_function("rq_round_factors")(ctypes.byref(arguments), _threads()):
        raise MemoryError
    return across, units


class _Factors(ctypes.Structure):
    """``Factors`` of plugins/quantizer/src/factors.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("factors", "balance")),
        *((name, ctypes.c_int64) for name in ("parts", "known", "block")),
        *((name, ctypes.c_void_p) for name in ("across", "units")),
    )


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """The inverse of the lower factor L of each of ``moments [parts, columns, columns]``, L L^T. Overwrites the moments."""
    columns, inverse = moments.shape[-1], torch.zeros_like(moments)
    blocks = [slice(start, min(start + COLUMNS_AT_ONCE, columns)) for start in range(0, columns, COLUMNS_AT_ONCE)]

    def divide(block: slice, by: slice) -> None:
        moments[:, block, by] = moments[:, block, by] @ inverse[:, by, by].mT

    def subtract(block: slice, factored: slice) -> None:
        below = moments[:, block.start :, factored]
        moments[:, block.start :, block] -= below @ moments[:, block, factored].mT

    def invert(block: slice) -> None:
        for later in blocks[blocks.index(block) + 1 :]:
            known = slice(block.start, later.start)
            inverse[:, later, block] = -inverse[:, later, later] @ (moments[:, later, known] @ inverse[:, known, block])

    with _threads_of_their_own(len(blocks)) as on_all:
        for number, block in enumerate(blocks):
            factor = torch.linalg.cholesky(moments[:, block, block])
            unit = torch.eye(factor.shape[-1], dtype=factor.dtype)
            inverse[:, block, block] = torch.linalg.solve_triangular(factor, unit, upper=False)
            on_all(partial(divide, by=block), blocks[number + 1 :])
            on_all(partial(subtract, factored=block), blocks[number + 1 :])
        on_all(invert, blocks)
    return inverse


@contextmanager
def _threads_of_their_own(most: int) -> Iterator[Callable[[Callable[[slice], None], Sequence[slice]], None]]:
    """A context in which torch uses one thread. Yields a function that calls another one on each of some blocks, on several
    threads (at most ``most``), which also have one of torch each."""
    before = torch.get_num_threads()
    threads = min(most, _threads()) if most > 1 else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def on_all(function: Callable[[slice], None], blocks: Sequence[slice]) -> None:
                deque(pool.map(function, blocks) if threads > 1 else map(function, blocks), maxlen=0)

            yield on_all
    finally:
        torch.set_num_threads(before)


def _threads() -> int:
    return max(1, default_threads() // on_this_host())
