"""Quantized weights as they are stored: packed as the engines read them, and decoded again.

``BlockFormat`` defines q and the scales. When packed, q is offset by the format's zero point. The columns of a row follow each
other bit by bit, with the first in the lowest bits of the first byte, as ONNX Runtime's ``MatMulNBits`` reads them. This module
needs only numpy.
"""

from dataclasses import dataclass
from functools import reduce

import numpy as np

from rq_compile.quantization.formats import BLOCK_FORMATS, Format


@dataclass(frozen=True)
class Quantized:
    """``packed`` uint8 ``[rows, blocks * block * bits / 8]`` and ``scales`` fp32 ``[rows, blocks]``."""

    packed: np.ndarray
    scales: np.ndarray


def packed(q: np.ndarray, format: Format) -> np.ndarray:
    """uint8 ``[rows, columns * bits / 8]`` from whole numbers ``q [rows, ...]``."""
    kept = BLOCK_FORMATS[format]
    offset = (q.astype(np.int16) + kept.zero_point).astype(np.uint8).reshape(len(q), -1)
    if 8 % kept.bits:
        bits = np.unpackbits(offset[..., None], axis=-1, count=kept.bits, bitorder="little")
        return np.packbits(bits.reshape(len(q), -1), axis=-1, bitorder="little")
    of_a_byte = 8 // kept.bits
    parts = [offset[:, place::of_a_byte] << place * kept.bits for place in range(of_a_byte)]
    return reduce(np.bitwise_or, parts)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[rows, columns]`` from ``packed [rows, columns * bits / 8]``: the number in each column's bits."""
    if bits == 8:
        return packed
    if 8 % bits:
        columns = np.unpackbits(packed, axis=-1, bitorder="little").reshape(len(packed), -1, bits)
        return np.packbits(columns, axis=-1, bitorder="little")[..., 0]
    parts = [packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(packed), -1)


def whole_numbers(quantized: Quantized, format: Format) -> np.ndarray:
    """int8 ``[rows, blocks * block]``: the numbers q that ``quantize`` packed, before multiplication by the scale."""
    kept = BLOCK_FORMATS[format]
    return (unpacked(quantized.packed, kept.bits) - np.uint8(kept.zero_point)).view(np.int8)


def dequantize(quantized: Quantized, format: Format, columns: int) -> np.ndarray:
    """fp32 ``[rows, columns]``: the values of the weights that ``quantize`` packed."""
    q = whole_numbers(quantized, format).reshape(*quantized.scales.shape, -1)
    return columns_of(q * quantized.scales[..., None], columns)


def columns_of(blocks: np.ndarray, columns: int) -> np.ndarray:
    """``[rows, columns]``: the values of ``blocks [rows, blocks, block]`` without the padding of the last block."""
    return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, :columns])
