"""Rounding with statistics of the inputs: GPTQ (Frantar et al., arXiv 2210.17323, Algorithm 1), with one scale per block.

Columns are rounded one after another. The columns that follow compensate for the rounding error of a column, as far as the second
moment of the inputs allows. The scale of a block is chosen just before its columns are rounded, by least squared error weighted
with the moment's diagonal, among fractions of the scale that just holds the block's largest weight. ``plugins/quantizer`` does
the work. Between blocks, the errors are passed on as small integers.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

from rq_compile.errors import UserError
from rq_compile.quantization.formats import BLOCK_FORMATS, Format
from rq_compile.quantization.library import quantizer_function
from rq_compile.quantization.rounding import NOT_FINITE
from rq_compile.quantization.second_moment import SecondMoment

# The arrays of ``Feedback``, in the order of ``Matrix``.
FEEDBACK = ("within", "across", "units", "balance", "importance")


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix ``[rows, columns]``: ``q`` int8 ``[rows, blocks, block]`` times ``scales`` fp32 ``[rows, blocks]``, padded beyond
    ``columns``."""

    q: np.ndarray
    scales: np.ndarray
    columns: int

    def values(self) -> np.ndarray:
        """fp32 ``[rows, columns]``"""
        return (self.q * self.scales[..., None]).reshape(len(self.q), -1)[:, : self.columns]

    def times(self, inputs: np.ndarray, threads: int = 1) -> np.ndarray:
        """The matrix times fp32 ``inputs [columns, n]``: fp32 ``[rows, n]``, the same for any number of ``threads``. Inputs are
        rounded to 16 bits, in a unit for each input and block of columns; the sums within blocks are exact."""
        inputs = np.ascontiguousarray(inputs, np.float32)
        tokens = inputs.shape[1]
        outputs = np.empty((len(self.q), tokens), np.float32)
        product = _Product(
            *(inputs.ctypes.data, tokens, self.columns, self.q.ctypes.data, self.scales.ctypes.data),
            *(*self.q.shape, outputs.ctypes.data),
        )
        if quantizer_function("rq_multiply_rounded")(ctypes.byref(product), threads):
            raise MemoryError
        return outputs


def gptq(
    weights: np.ndarray, format: Format, moment: SecondMoment, block: int, threads: int = 1, changes: np.ndarray | None = None
) -> Rounded:
    """Round fp32 ``weights [rows, columns]`` in blocks of ``block`` columns. The last block is padded with zeros.

    ``block`` divides the columns of a moment by blocks. The result for a row depends only on the row and the moment, for any
    number of ``threads``. The sum of the squared changes of each row is added to ``changes``, float64 ``[rows]``.

    Raises:
        UserError: a weight is not finite, or the quantizer's library is missing.
    """
    q = np.empty((len(weights), moment.feedback(block).blocks, block), np.int8)
    scales = _round(weights, format, moment, block, threads, q=q, changes=changes)
    return Rounded(q, scales, weights.shape[1])


def gptq_values(weights: np.ndarray, format: Format, moment: SecondMoment, block: int, threads: int = 1) -> np.ndarray:
    """The values, fp32 ``[rows, columns]``, of the weights that ``gptq`` rounds, with the same arguments and errors."""
    values = np.empty(weights.shape, np.float32)
    _round(weights, format, moment, block, threads, values=values)
    return values


def _round(
    weights: np.ndarray,
    format: Format,
    moment: SecondMoment,
    block: int,
    threads: int,
    *,
    q: np.ndarray | None = None,
    values: np.ndarray | None = None,
    changes: np.ndarray | None = None,
) -> np.ndarray:
    """Write ``q`` or ``values``, add to ``changes [rows]``, and return the scales."""
    rows, columns = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    feedback = moment.feedback(block)
    parts = len(feedback.across)
    scales = np.empty((rows, feedback.blocks), np.float32)
    kept = BLOCK_FORMATS[format]
    fractions = np.linspace(1.0, kept.smallest, kept.fractions, dtype=np.float32)
    matrix = _Matrix(
        *(weights.ctypes.data, rows, columns, parts, feedback.blocks // parts * block, block),
        *(getattr(feedback, name).ctypes.data for name in FEEDBACK),
        *(fractions.ctypes.data, len(fractions), kept.least, kept.greatest),
        *(None if array is None else array.ctypes.data for array in (q, scales, values, changes)),
    )
    status = quantizer_function("rq_gptq")(ctypes.byref(matrix), threads)
    if status == 1:
        raise UserError(NOT_FINITE)
    if status:
        raise MemoryError
    return scales


class _Matrix(ctypes.Structure):
    """``Matrix`` of plugins/quantizer/src/gptq.h."""

    _fields_ = (
        *((name, ctypes.c_void_p if name == "weights" else ctypes.c_int64) for name in ("weights", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("parts", "known", "block")),
        *((name, ctypes.c_void_p) for name in (*FEEDBACK, "fractions")),
        ("fraction_count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("least", "greatest")),
        *((name, ctypes.c_void_p) for name in ("q", "scales", "values", "changes")),
    )


class _Product(ctypes.Structure):
    """``Product`` of plugins/quantizer/src/product.h."""

    _fields_ = (
        ("inputs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "columns")),
        *((name, ctypes.c_void_p) for name in ("q", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "blocks", "block")),
        ("outputs", ctypes.c_void_p),
    )
