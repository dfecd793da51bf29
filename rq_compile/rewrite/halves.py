"""Weights in 16 bits, whose range may be too small."""

import ml_dtypes
import numpy as np

from rq_compile.errors import UserError

HALVES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def in_half(values: np.ndarray, half: np.dtype, name: str) -> np.ndarray:
    """``values`` in ``half``, float16 or bfloat16. ``name``: the name of the weight.

    Raises:
        UserError: ``half`` cannot hold one of the values.
    """
    with np.errstate(over="ignore"):
        made = values.astype(half, copy=False)
    if not np.isfinite(made).all():
        largest = np.abs(values.astype(np.float32)).max()
        raise UserError(
            f"{name} has the value {largest:.4g}, which {half} cannot hold; "
            "for .plan use --precision bf16, for .onnx --lowering native"
        )
    return made
