"""Rounding to the nearest: the scales of a block of weights, and the integers that its weights become."""

import numpy as np

from rq_compile.errors import UserError
from rq_compile.quantization.formats import BLOCK_FORMATS, Format

NOT_FINITE = "a weight of an expert is not a finite number but NaN or infinite; repair the checkpoint"


def holding_scales(weights: np.ndarray, format: Format) -> np.ndarray:
    """Scales, fp32 ``[...]``, of ``weights [..., block]``: the largest magnitude falls on the end of the format's range.

    See ``BlockFormat.signed_scales`` for the sign.

    Raises:
        UserError: a weight is not finite.
    """
    largest, smallest = weights.max(axis=-1), weights.min(axis=-1)
    kept = BLOCK_FORMATS[format]
    if kept.signed_scales:
        scales = np.where(largest > -smallest, largest, smallest) / np.float32(kept.least)
    else:
        scales = np.maximum(largest, -smallest) / np.float32(kept.greatest)
    if not np.isfinite(scales).all():
        raise UserError(NOT_FINITE)
    return scales.astype(np.float32)


def nearest(weights: np.ndarray, scales: np.ndarray, format: Format) -> np.ndarray:
    """Whole numbers q, as floats, of ``weights [..., block]`` with ``scales [...]``: ``q * scale`` is nearest to the weight."""
    # Do not divide by zero if a block consists of zeros, or is so small that its scale is subnormal.
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales != 0, np.float32(1) / scales, np.float32(0))
    inverse[~np.isfinite(inverse)] = 0
    kept = BLOCK_FORMATS[format]
    return np.clip(np.rint(weights * inverse[..., None]), kept.least, kept.greatest)
