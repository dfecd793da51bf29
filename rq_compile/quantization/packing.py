"""Quantized weights as they are stored: packed as the engines read them, and decoded again.

``PackedFormat`` defines q, its codes and the scales. The codes of a row follow each
other bit by bit, with the first in the lowest bits of the first byte, as ONNX Runtime's ``MatMulNBits`` reads them. This module
needs only numpy.
"""

from dataclasses import dataclass
from functools import cache, reduce

import numpy as np

from rq_compile.quantization.formats import PACKED_FORMATS, BlockFormat, Format, Fp8Format, MxFormat


@dataclass(frozen=True)
class Quantized:
    """``packed`` uint8 ``[rows, blocks * block * bits / 8]`` and ``scales [rows, blocks]``, fp32 or, as exponents, uint8."""

    packed: np.ndarray
    scales: np.ndarray


def packed(q: np.ndarray, format: Format) -> np.ndarray:
    """uint8 ``[rows, columns * bits / 8]`` from numbers ``q [rows, ...]``: whole ones, or float8_e4m3fn for fp8."""
    kept = PACKED_FORMATS[format]
    if isinstance(kept, Fp8Format):
        codes = q.view(np.uint8)
    elif isinstance(kept, BlockFormat):
        codes = q.astype(np.int8, copy=False).view(np.uint8) + np.uint8(kept.zero_point)
    else:
        codes = _codes(format)[q.astype(np.int8).view(np.uint8)]
    return packed_codes(codes.reshape(len(q), -1), kept.bits)


def packed_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[rows, columns * bits / 8]`` from ``codes [rows, columns]``; ``unpacked`` is the inverse."""
    if bits == 8:
        return codes
    if 8 % bits:  # eight codes in every `bits` bytes
        eights = reduce(np.bitwise_or, [codes[:, i::8].astype(np.uint64) << np.uint64(i * bits) for i in range(8)])
        parts = [(eights >> np.uint64(8 * i)).astype(np.uint8) for i in range(bits)]
        return np.stack(parts, axis=-1).reshape(len(codes), -1)
    # The codes of a byte are shifted together, as one number, until each is in its place in the lowest byte.
    of_a_byte = 8 // bits
    together = np.ascontiguousarray(codes).view(f"<u{of_a_byte}")
    return reduce(np.bitwise_or, [together >> place * (8 - bits) for place in range(of_a_byte)]).astype(np.uint8)


def in_planes(packed: np.ndarray, bits: int, blocks: int) -> np.ndarray:
    """``packed`` with weights of 3 bits in the order in which GPU kernels read them (docs/kernels.md).

    Eight weights take 24 bits. Each of a row's ``blocks`` blocks holds the lower 16 bits of all its eights, then the upper 8.
    """
    if bits != 3:
        return packed
    eights = packed.reshape(len(packed), blocks, -1, bits)
    lower = eights[..., :2].reshape(len(packed), blocks, -1)
    return np.concatenate([lower, eights[..., 2]], axis=2).reshape(packed.shape)


@cache
def _codes(format: Format) -> np.ndarray:
    """uint8 ``[256]``: the code of each number, by its byte. Of equal numbers (0 and -0), the first code counts."""
    codes = np.zeros(256, np.uint8)
    numbers = PACKED_FORMATS[format].numbers
    for code in reversed(range(len(numbers))):
        codes[int(numbers[code]) % 256] = code
    return codes


def stored_scales(scales: np.ndarray, format: Format) -> np.ndarray:
    """fp32 ``scales`` as the format stores them. They must be ones that it can store, see ``storable_scales``."""
    kept = PACKED_FORMATS[format]
    if not isinstance(kept, MxFormat):
        return scales
    return (np.frexp(scales / np.float32(kept.unit))[1] + 126).astype(np.uint8)


def storable_scales(scales: np.ndarray, format: Format) -> np.ndarray:
    """bool ``[...]``: whether the format can store each of the fp32 ``scales``."""
    kept = PACKED_FORMATS[format]
    if not isinstance(kept, MxFormat):
        return np.ones(scales.shape, bool)
    fraction, exponent = np.frexp(scales / np.float32(kept.unit))
    return (fraction == 0.5) & (exponent > -126) & (exponent <= 128)


def scale_values(scales: np.ndarray, format: Format) -> np.ndarray:
    """fp32 values of ``scales`` as the format stores them."""
    kept = PACKED_FORMATS[format]
    if not isinstance(kept, MxFormat):
        return scales
    return (np.exp2(scales.astype(np.float64) - 127) * kept.unit).astype(np.float32)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[rows, columns]`` from ``packed [rows, columns * bits / 8]``: the number in each column's bits."""
    if bits == 8:
        return packed
    if 8 % bits:
        eights = reduce(np.bitwise_or, [packed[:, i::bits].astype(np.uint64) << np.uint64(8 * i) for i in range(bits)])
        parts = [(eights >> np.uint64(bits * i)).astype(np.uint8) & (1 << bits) - 1 for i in range(8)]
        return np.stack(parts, axis=-1).reshape(len(packed), -1)
    of_a_byte = 8 // bits
    together = packed.astype(f"<u{of_a_byte}", order="C")
    apart = reduce(np.bitwise_or, [together << place * (8 - bits) for place in range(of_a_byte)])
    return apart.view(np.uint8) & np.uint8((1 << bits) - 1)


def whole_numbers(quantized: Quantized, format: Format) -> np.ndarray:
    """int8 ``[rows, blocks * block]``: the numbers q that ``quantize`` packed, before multiplication by the scale."""
    kept = PACKED_FORMATS[format]
    codes = unpacked(quantized.packed, kept.bits)
    if isinstance(kept, BlockFormat):
        return (codes - np.uint8(kept.zero_point)).view(np.int8)
    return np.array(kept.numbers, np.int8)[codes]


def dequantize(quantized: Quantized, format: Format, columns: int) -> np.ndarray:
    """fp32 ``[rows, columns]``: the values of the weights that ``quantize`` packed."""
    kept, codes = PACKED_FORMATS[format], quantized.packed
    fp8 = isinstance(kept, Fp8Format)
    q = np.array(kept.numbers, np.float32)[codes] if fp8 else whole_numbers(quantized, format)
    q = q.reshape(*quantized.scales.shape, -1)
    return columns_of(q * scale_values(quantized.scales, format)[..., None], columns)


def columns_of(blocks: np.ndarray, columns: int) -> np.ndarray:
    """``[rows, columns]``: the values of ``blocks [rows, blocks, block]`` without the padding of the last block."""
    return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, :columns])
