"""Weights in a format: quantized, packed as the engines read them, and what they are worth once stored.

Block-wise and symmetric: ``block_size(columns)`` neighbours of a row share one scale, and a weight is ``q * scale`` with q in
[-127, 127] (int8) or [-8, 7] (int4). Packed, q is offset by 128 or 8, the zero points of ONNX Runtime's ``MatMulNBits``; int4
holds the even column in the low nibble.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from rq_compile.errors import UserError
from rq_compile.quantization.formats import QUANTIZED_FORMATS, Format, block_size

ZERO_POINT: dict[Format, int] = {"int8": 128, "int4": 8}
FLOAT_DTYPES: dict[Format, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Quantized:
    """``packed`` uint8 ``[rows, blocks * block * bits / 8]`` and ``scales`` fp32 ``[rows, blocks]``."""

    packed: np.ndarray
    scales: np.ndarray


def quantize(weights: np.ndarray, format: Format) -> Quantized:
    """Round ``weights [rows, columns]`` of any float dtype to the nearest values that ``format`` ("int8" or "int4") holds.

    Raises:
        UserError: a weight is not a finite number.
    """
    blocks = _blocks(weights)
    scales = _scales(blocks, format)
    return Quantized(_pack(_rounded(blocks, scales, format), format), scales)


def stored(weights: np.ndarray, format: Format) -> np.ndarray:
    """fp32 ``[rows, columns]``: the values that ``weights`` have once they are kept in ``format``.

    Raises:
        UserError: a weight that is to be quantized is not a finite number.
    """
    if format not in QUANTIZED_FORMATS:
        return weights.astype(FLOAT_DTYPES[format]).astype(np.float32)
    blocks = _blocks(weights)
    scales = _scales(blocks, format)
    return _columns(_rounded(blocks, scales, format) * scales[..., None], weights.shape[1])


def whole_numbers(quantized: Quantized, format: Format) -> np.ndarray:
    """int8 ``[rows, blocks * block]``: the q of what ``quantize`` packed, each to be multiplied by its block's scale."""
    packed = quantized.packed
    if format == "int4":
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return (packed - np.uint8(ZERO_POINT[format])).view(np.int8)


def dequantize(quantized: Quantized, format: Format, columns: int) -> np.ndarray:
    """fp32 ``[rows, columns]`` of what ``quantize`` packed."""
    q = whole_numbers(quantized, format).reshape(*quantized.scales.shape, -1)
    return _columns(q * quantized.scales[..., None], columns)


def _blocks(weights: np.ndarray) -> np.ndarray:
    """fp32 ``[rows, blocks, block]``, the last block of a row filled up with zeros."""
    rows, columns = weights.shape
    block = block_size(columns)
    values = weights.astype(np.float32)
    if columns % block:
        values = np.pad(values, ((0, 0), (0, -columns % block)))
    return values.reshape(rows, -1, block)


def _scales(blocks: np.ndarray, format: Format) -> np.ndarray:
    """fp32 ``[rows, blocks]``: the block's largest magnitude falls on the end of the range.

    int4 has one value more on the negative side, so its scale takes the sign that puts the largest weight there.
    """
    largest, smallest = blocks.max(axis=-1), blocks.min(axis=-1)
    if format == "int8":
        scales = np.maximum(largest, -smallest) / np.float32(127)
    else:
        scales = np.where(largest > -smallest, largest, smallest) / np.float32(-8)
    if not np.isfinite(scales).all():
        raise UserError("a weight of an expert is not a finite number; repair the checkpoint")
    return scales


def _rounded(blocks: np.ndarray, scales: np.ndarray, format: Format) -> np.ndarray:
    """fp32 whole numbers q ``[rows, blocks, block]``."""
    # A block of zeros, or one so small that its scale is subnormal, must not divide by zero.
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales != 0, np.float32(1) / scales, np.float32(0))
    inverse[~np.isfinite(inverse)] = 0
    low = -127 if format == "int8" else -8
    return np.clip(np.rint(blocks * inverse[..., None]), low, -low if format == "int8" else 7)


def _pack(q: np.ndarray, format: Format) -> np.ndarray:
    offset = (q + ZERO_POINT[format]).astype(np.uint8).reshape(len(q), -1)
    return offset if format == "int8" else offset[:, 0::2] | offset[:, 1::2] << 4


def _columns(blocks: np.ndarray, columns: int) -> np.ndarray:
    return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, :columns])
