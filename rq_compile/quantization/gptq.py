"""Rounding with a look at the inputs: GPTQ (Frantar et al., arXiv 2210.17323, Algorithm 1), in blocks that have one scale each.

Columns are rounded one after the other; what rounding one adds to the output is taken out again by the columns after it, as far
as the inputs' second moment says they can. A block's scale is chosen when its turn comes, by least squared error under the
moment's diagonal, among fractions of the scale that just holds the block's largest weight.
"""

import numpy as np

from rq_compile.quantization.formats import Format
from rq_compile.quantization.rounding import holding_scales, nearest
from rq_compile.quantization.second_moment import SecondMoment

# Clipping the largest weights pays where there are few levels.
FRACTIONS: dict[Format, np.ndarray] = {"int8": np.linspace(1.0, 0.9, 5), "int4": np.linspace(1.0, 0.6, 17)}


def gptq(blocks: np.ndarray, format: Format, moment: SecondMoment) -> tuple[np.ndarray, np.ndarray]:
    """Round ``blocks [rows, blocks, block]``, filled up with zeros beyond the moment's columns.

    A block is no wider than those of the moment, and lies in one of them. Returns whole numbers of that shape, as floats, and
    fp32 scales ``[rows, blocks]``.

    Raises:
        UserError: a weight is not a finite number.
    """
    rows, count, width = blocks.shape
    # Columns that are rounded with a look at each other: all of them, or those of one block of the moment.
    known = moment.values.shape[-1]
    columns = known if moment.whole else count * width
    left = blocks.reshape(rows, -1).astype(np.float64)
    q, scales = np.zeros_like(left), np.empty((rows, count), np.float32)
    diagonal = moment.damped.diagonal(axis1=-2, axis2=-1).reshape(-1)
    factors = moment.inverse_factor.reshape(-1, known, known)
    for number in range(count):
        mine = slice(number * width, min((number + 1) * width, columns))
        part, first = divmod(mine.start, known)
        held = slice(first, first + mine.stop - mine.start)
        scales[:, number] = _best_scales(left[:, mine], format, diagonal[mine])
        q[:, mine], errors = _in_turn(left[:, mine], scales[:, number], format, factors[part, held, held])
        left[:, mine.stop : (part + 1) * known] -= errors @ factors[part, held, held.stop :]
    return q.reshape(blocks.shape), scales


def _best_scales(weights: np.ndarray, format: Format, importance: np.ndarray) -> np.ndarray:
    """fp32 ``[rows]`` for ``weights [rows, block]`` whose squared errors count ``importance [block]`` times."""
    holding = holding_scales(weights, format)
    best, least = holding, np.full(len(weights), np.inf)
    for fraction in FRACTIONS[format]:
        scales = (holding * fraction).astype(np.float32)
        error = (nearest(weights, scales, format) * scales[:, None] - weights) ** 2 @ importance
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


def _in_turn(weights: np.ndarray, scales: np.ndarray, format: Format, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and what is left for later columns to take out, both ``[rows, block]``; ``factor [block, block]``."""
    left, q, errors = weights.copy(), np.empty_like(weights), np.empty_like(weights)
    for column in range(left.shape[1]):
        q[:, column] = nearest(left[:, column, None], scales, format)[:, 0]
        errors[:, column] = (left[:, column] - q[:, column] * scales) / factor[column, column]
        left[:, column + 1 :] -= np.outer(errors[:, column], factor[column, column + 1 :])
    return q, errors
