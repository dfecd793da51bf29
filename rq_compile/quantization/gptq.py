"""Rounding with a look at the inputs: GPTQ (Frantar et al., arXiv 2210.17323, Algorithm 1), in blocks that have one scale each.

Columns are rounded one after the other; what rounding one adds to the output is taken out again by the columns after it, as far
as the inputs' second moment says they can. A block's scale is chosen when its turn comes, by least squared error under the
moment's diagonal, among fractions of the scale that just holds the block's largest weight. ``plugins/quantizer`` does the work.
"""

import ctypes

import numpy as np

from rq_compile.errors import UserError
from rq_compile.quantization.formats import BLOCK_FORMATS, Format
from rq_compile.quantization.library import quantizer_library
from rq_compile.quantization.rounding import NOT_FINITE
from rq_compile.quantization.second_moment import SecondMoment


def gptq(
    weights: np.ndarray, format: Format, moment: SecondMoment, block: int, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Round ``weights [rows, columns]`` fp32 in blocks of ``block`` columns, the last one filled up with zeros.

    ``block`` divides the columns of a moment by blocks. Returns whole numbers int8 ``[rows, blocks, block]`` and fp32 scales
    ``[rows, blocks]``; a row's depend on nothing but the row and the moment, whatever ``threads`` is.

    Raises:
        UserError: a weight is not a finite number, or the package was not built.
    """
    rows, columns = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    feedback = moment.feedback(block)
    parts, blocks_of_part = feedback.shape[:2]
    blocks = parts * blocks_of_part
    q, scales = np.empty((rows, blocks, block), np.int8), np.empty((rows, blocks), np.float32)
    kept, importance = BLOCK_FORMATS[format], moment.importance(block)
    fractions = np.linspace(1.0, kept.smallest, kept.fractions, dtype=np.float32)
    matrix = _Matrix(
        *(weights.ctypes.data, rows, columns, parts, blocks_of_part * block, block),
        *(feedback.ctypes.data, importance.ctypes.data, fractions.ctypes.data, len(fractions), kept.least, kept.greatest),
        *(q.ctypes.data, scales.ctypes.data),
    )
    status = quantizer_library().rq_gptq(ctypes.byref(matrix), threads)
    if status == 1:
        raise UserError(NOT_FINITE)
    if status:
        raise MemoryError
    needed = -(-columns // block)  # a moment may be filled up to more
    return (q, scales) if needed == blocks else (q[:, :needed], scales[:, :needed])


class _Matrix(ctypes.Structure):
    """``Matrix`` of plugins/quantizer/src/gptq.h."""

    _fields_ = (
        *((name, ctypes.c_void_p if name == "weights" else ctypes.c_int64) for name in ("weights", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("parts", "known", "block")),
        *((name, ctypes.c_void_p) for name in ("feedback", "importance", "fractions")),
        ("fraction_count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("least", "greatest")),
        *((name, ctypes.c_void_p) for name in ("q", "scales")),
    )
