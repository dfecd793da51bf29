"""Statistics of the inputs of a weight matrix for a quantizer: their second moment on the calibration text, as an additive
sum."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch

from rq_compile.processes import world
from rq_compile.quantization.feedback import Feedback, feedback_of

ROWS_AT_ONCE = 1024
# Columns of a moment that are summed at a time.
SUMMED_AT_ONCE = 512


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
                self._by_block[block] = feedback_of(self.values, block)
            return self._by_block[block]

    def know(self, block: int, feedback: Feedback) -> None:
        """Take over the feedback that another process computed of an equal moment."""
        with self._lock:
            self._by_block.setdefault(block, feedback)


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
