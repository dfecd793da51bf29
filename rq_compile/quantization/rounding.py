"""Rounding to the nearest: the scales of a block of weights, and the whole numbers that its weights become."""

import numpy as np

from rq_compile.errors import UserError
from rq_compile.quantization.formats import WHOLE_NUMBERS, Format

NOT_FINITE = "a weight of an expert is not a finite number but NaN or infinite; repair the checkpoint"


def holding_scales(weights: np.ndarray, format: Format) -> np.ndarray:
    """fp32 ``[...]`` of ``weights [..., block]``: the largest magnitude falls on the end of the format's range.

    int4 has one value more on the negative side, so its scale takes the sign that puts the largest weight there.

    Raises:
        UserError: a weight is not a finite number.
    """
    largest, smallest = weights.max(axis=-1), weights.min(axis=-1)
    if format == "int8":
        scales = np.maximum(largest, -smallest) / np.float32(127)
    else:
        scales = np.where(largest > -smallest, largest, smallest) / np.float32(-8)
    if not np.isfinite(scales).all():
        raise UserError(NOT_FINITE)
    return scales.astype(np.float32)


def nearest(weights: np.ndarray, scales: np.ndarray, format: Format) -> np.ndarray:
    """Whole numbers q, as floats, of ``weights [..., block]`` with ``scales [...]``: ``q * scale`` is nearest to the weight."""
    # A block of zeros, or one so small that its scale is subnormal, must not divide by zero.
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales != 0, np.float32(1) / scales, np.float32(0))
    inverse[~np.isfinite(inverse)] = 0
    return np.clip(np.rint(weights * inverse[..., None]), *WHOLE_NUMBERS[format])
