"""Statistics of the inputs of a weight matrix for a quantizer: their second moment on the calibration text, as an additive
sum."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

import numpy as np
import torch

from rq_compile.processes import on_this_host, world
from rq_compile.standalone.limits import default_threads

# Fraction of the mean diagonal that is added to it, so that directions with few calibration tokens do not count as free of error.
DAMPING = 0.01
ROWS_AT_ONCE = 1024
# Columns of a moment that are summed at a time.
SUMMED_AT_ONCE = 512
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


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """``values`` fp32: the sum of ``x x^T`` over inputs x. Either the whole moment ``[columns, columns]``, or only the parts
    within blocks of columns, ``[blocks, block, block]`` (the last one padded with zeros), which are ``columns / block`` times
    smaller.
    """

    values: np.ndarray
    _by_block: dict[int, Feedback] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @property
    def whole(self) -> bool:
        return self.values.ndim == 2

    def feedback(self, block: int) -> Feedback:
        """Computed once, for all threads."""
        with self._lock:
            if block not in self._by_block:
                self._by_block[block] = self._feedback(block)
            return self._by_block[block]

    def know(self, block: int, feedback: Feedback) -> None:
        """Take over the feedback that another process computed of an equal moment."""
        with self._lock:
            self._by_block.setdefault(block, feedback)

    def _feedback(self, block: int) -> Feedback:
        moments = self.values.astype(np.float64).reshape(-1, *self.values.shape[-2:])
        columns = moments.shape[-1]
        width = columns + -columns % block
        mean = float(moments.diagonal(axis1=1, axis2=2).mean())
        # Without any tokens, all inputs have the same weight.
        if mean > 0:
            moments /= mean
        moments[:, range(columns), range(columns)] += DAMPING if mean > 0 else 1.0
        # The factor U of the moment's inverse, U^T U, is the inverse of the factor R of the moment, R R^T, both upper
        # triangular; R, in reverse order, is the lower factor of the moment in reverse order.
        factors = torch.zeros(len(moments), width, width)
        upper = factors[:, :columns, :columns]
        upper.copy_(_inverse_factor(torch.from_numpy(moments).flip(1, 2)).float().flip(1, 2))
        diagonal = upper.diagonal(dim1=1, dim2=2).clone()
        upper /= diagonal[..., None]
        # An input much larger than the others has much larger factors. Errors and factors each take half of the difference, so
        # that few bits of either suffice.
        balance = torch.ones(len(moments), width)
        balance[:, :columns] = diagonal.rsqrt()
        balance = balance.unflatten(1, (-1, block))
        balance = (balance / balance.amax(2, keepdim=True)).flatten(1)
        within = torch.stack([factors[:, start : start + block, start : start + block] for start in range(0, width, block)], 1)
        numbers, units = _rounded_factors(factors, balance, block)
        # [parts, blocks, block / 4, 4, blocks of the columns that are factors' sources, block / 4, 4]
        quads = (numbers + OFFSET).view(torch.uint8).view(-1, width // block, block // 4, 4, width // block, block // 4, 4)
        importance = np.pad(moments.diagonal(axis1=1, axis2=2), ((0, 0), (0, width - columns)))
        return Feedback(
            within=within.numpy(),
            across=quads.permute(0, 1, 4, 2, 5, 3, 6).contiguous().numpy(),
            units=units.transpose(2, 3).contiguous().numpy(),
            balance=balance.numpy(),
            importance=importance.astype(np.float32).ravel(),
        )


def _rounded_factors(factors: torch.Tensor, balance: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``factors [parts, width, width]`` of columns for those of later blocks, divided by ``balance [parts, width]``, as
    integers up to ``GREATEST``: int8 ``[parts, width, width]``, indexed by the later column and the earlier one. Their units are
    fp32 ``[parts, blocks, block, blocks]``, indexed by the later column and the block of the earlier one.

    Factors are rounded as GPTQ rounds weights: the columns that follow compensate for what the rounding for a column changes.
    """
    parts, width, _ = factors.shape
    # Contiguous, because a column's factors are rounded together.
    left = (factors / balance[..., None]).mT.contiguous()
    numbers = torch.zeros(parts, width, width, dtype=torch.int8)
    units = torch.zeros(parts, width // block, block, width // block)
    blocks = [slice(start, start + block) for start in range(0, width, block)]

    def compensate(later: slice, errors: torch.Tensor, own: slice) -> None:
        left[:, later, : own.start] -= factors[:, own, later].mT @ errors

    with _threads_of_their_own(len(blocks)) as on_all:
        for number, own in enumerate(blocks[1:], 1):
            errors = left[:, own, : own.start]
            unit = errors.unflatten(2, (number, block)).abs().amax(3) / GREATEST
            units[:, number, :, :number] = unit
            unit = unit.clamp(min=torch.finfo(unit.dtype).tiny).repeat_interleave(block, 2)
            for c in range(block):
                column = errors[:, c]
                whole = (column / unit[:, c]).round_().clamp_(-GREATEST, GREATEST)
                numbers[:, own.start + c, : own.start] = whole
                column -= whole * unit[:, c]
                errors[:, c + 1 :] -= factors[:, own.start + c, own.start + c + 1 : own.stop, None] * column[:, None]
            on_all(partial(compensate, errors=errors, own=own), blocks[number + 1 :])
    return numbers, units


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
    threads = min(most, max(1, default_threads() // on_this_host()))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def on_all(function: Callable[[slice], None], blocks: Sequence[slice]) -> None:
                deque(pool.map(function, blocks) if threads > 1 else map(function, blocks), maxlen=0)

            yield on_all
    finally:
        torch.set_num_threads(before)


def share_feedback(moments: Sequence[tuple[SecondMoment, int]]) -> None:
    """Compute the feedback of moments, each with its block. They are the same on every process; one process computes each."""
    owners = world().owners(moment.values.size for moment, _ in moments)
    own = [moment.feedback(block) for moment, block in world().own(owners, moments)]
    for (moment, block), feedback in zip(moments, world().all(owners, own), strict=True):
        moment.know(block, feedback)


def whole_moment(inputs: np.ndarray) -> SecondMoment:
    """The moment of fp32 ``inputs [n, columns]`` (which may be mapped from disk); zeros without inputs. The inputs are the same
    on every process of the world, and each process multiplies some of them."""
    # In float64, the order of the sum, and thus the number of processes, does not affect the fp32 result.
    total = np.zeros((inputs.shape[1], inputs.shape[1]))
    starts = range(0, len(inputs), ROWS_AT_ONCE)
    for start in world().own(world().owners([1] * len(starts)), starts):
        add_products(total, torch.from_numpy(np.array(inputs[start : start + ROWS_AT_ONCE])))
    return moment_of(total)


def add_products(total: np.ndarray, rows: torch.Tensor) -> None:
    """Add the sum of ``x x^T`` over the fp32 ``rows [n, columns]`` to ``total [columns, columns]``, float64: only to what
    ``moment_of`` needs, which is a little more than the upper half."""
    into = torch.from_numpy(total)
    for start in range(0, rows.shape[1], SUMMED_AT_ONCE):
        into[start : start + SUMMED_AT_ONCE, start:] += rows[:, start : start + SUMMED_AT_ONCE].mT @ rows[:, start:]


def moment_of(total: np.ndarray) -> SecondMoment:
    """The moment of the rows whose products all processes have added to their ``total``."""
    values = world().sum(total).astype(np.float32)
    for end in range(SUMMED_AT_ONCE, len(values), SUMMED_AT_ONCE):
        values[end:, end - SUMMED_AT_ONCE : end] = values[end - SUMMED_AT_ONCE : end, end:].T
    return SecondMoment(values)


def block_products(inputs: np.ndarray, block: int) -> np.ndarray:
    """Sum of ``x x^T`` over ``inputs [n, columns]`` within blocks of columns, the last one padded: ``[blocks, block, block]``."""
    tokens, columns = inputs.shape
    filled = torch.nn.functional.pad(torch.from_numpy(inputs), (0, -columns % block))
    # With torch's threads, like the steps before and after. numpy's threads would keep the cores busy while they wait.
    blocks = filled.reshape(tokens, -(-columns // block), block).transpose(0, 1)
    return torch.bmm(blocks.mT, blocks).numpy()


def block_moment(inputs: np.ndarray, block: int) -> SecondMoment:
    """The moment of fp32 ``inputs [n, columns]`` within blocks of ``block`` columns."""
    return SecondMoment(block_products(inputs, block))
