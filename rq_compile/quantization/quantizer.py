"""Weights in a format: quantized, packed as the engines read them, and what they are worth once stored.

``BlockFormat`` says what q and scales are. Packed, q is offset by the format's zero point. The columns of a row follow each other
bit by bit, the first in the lowest bits of the first byte, as ONNX Runtime's ``MatMulNBits`` reads them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import ml_dtypes
import numpy as np
import torch

from rq_compile.quantization.formats import BLOCK_FORMATS, SLOT_FORMATS, Block, Format, block_size
from rq_compile.quantization.gptq import gptq
from rq_compile.quantization.rounding import holding_scales, nearest
from rq_compile.quantization.second_moment import SecondMoment
from rq_compile.quantization.source_integers import SourceIntegers

# Weights that are rounded to the nearest at a time: so few that they stay in the caches.
NEAREST_TILE = 1 << 19


@dataclass(frozen=True)
class Quantized:
    """``packed`` uint8 ``[rows, blocks * block * bits / 8]`` and ``scales`` fp32 ``[rows, blocks]``."""

    packed: np.ndarray
    scales: np.ndarray


def carried(integers: SourceIntegers | None, format: Format, most: Block = 128) -> Quantized | None:
    """What a checkpoint stores as whole numbers, packed as it is; None where it does not, or ``format`` cannot hold it."""
    held = integers.in_blocks(format, most) if integers else None
    return None if held is None else Quantized(_pack(held[0], format), held[1])


def quantize(
    weights: np.ndarray, format: Format, moment: SecondMoment | None = None, most: Block = 128, *, threads: int = 1
) -> Quantized:
    """Round ``weights [rows, columns]`` of any float dtype to what the quantized ``format`` holds.

    To the nearest; or, where the second ``moment`` of the matrix's inputs is given, such that its outputs change least (GPTQ),
    on so many ``threads``. ``most`` weights share a scale, see ``block_size``.

    Raises:
        UserError: a weight is not a finite number.
    """
    packed, scales = zip(
        *((_pack(q, format), scales) for q, scales in _rounded(weights, format, moment, most, threads)), strict=True
    )
    return Quantized(np.concatenate(packed), np.concatenate(scales))


def stored(
    weights: np.ndarray, format: Format, moment: SecondMoment | None = None, most: Block = 128, *, threads: int = 1
) -> np.ndarray:
    """fp32 ``[rows, columns]``: the values that ``weights`` have once kept in ``format``; for the rest see ``quantize``.

    Raises:
        UserError: a weight that is to be quantized is not a finite number.
    """
    kept = SLOT_FORMATS[format]
    if not kept.quantized:
        return torch_tensor(weights).to(getattr(torch, kept.element)).float().numpy()
    columns = weights.shape[1]
    return np.concatenate(
        [
            _columns(torch.from_numpy(q).float().mul_(torch.from_numpy(scales)[..., None]).numpy(), columns)
            for q, scales in _rounded(weights, format, moment, most, threads)
        ]
    )


def torch_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a torch tensor that shares its memory, where the array may be written, or a copy."""
    array = array if array.flags.writeable else array.copy()
    return (
        torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        if array.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(array)
    )


def _rounded(
    weights: np.ndarray, format: Format, moment: SecondMoment | None, most: Block, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole numbers ``[rows, blocks, block]`` and scales ``[rows, blocks]``, of some rows at a time."""
    if moment is not None:
        yield gptq(torch_tensor(weights).float().numpy(), format, moment, block_size(weights.shape[1], most), threads)
        return
    rows = max(1, NEAREST_TILE // weights.shape[1])
    for start in range(0, max(1, len(weights)), rows):
        blocks = _blocks(weights[start : start + rows], most)
        scales = holding_scales(blocks, format)
        yield nearest(blocks, scales, format), scales


def whole_numbers(quantized: Quantized, format: Format) -> np.ndarray:
    """int8 ``[rows, blocks * block]``: the q of what ``quantize`` packed, each to be multiplied by its block's scale."""
    kept = BLOCK_FORMATS[format]
    return (unpacked(quantized.packed, kept.bits) - np.uint8(kept.zero_point)).view(np.int8)


def dequantize(quantized: Quantized, format: Format, columns: int) -> np.ndarray:
    """fp32 ``[rows, columns]`` of what ``quantize`` packed."""
    q = whole_numbers(quantized, format).reshape(*quantized.scales.shape, -1)
    return _columns(q * quantized.scales[..., None], columns)


def _blocks(weights: np.ndarray, most: Block) -> np.ndarray:
    """fp32 ``[rows, blocks, block]``, the last block of a row filled up with zeros."""
    rows, columns = weights.shape
    block = block_size(columns, most)
    values = weights.astype(np.float32)
    if columns % block:
        values = np.pad(values, ((0, 0), (0, -columns % block)))
    return values.reshape(rows, -1, block)


def _pack(q: np.ndarray, format: Format) -> np.ndarray:
    kept = BLOCK_FORMATS[format]
    offset = (q.astype(np.int16) + kept.zero_point).astype(np.uint8).reshape(len(q), -1)
    if 8 % kept.bits:
        bits = np.unpackbits(offset[..., None], axis=-1, count=kept.bits, bitorder="little")
        return np.packbits(bits.reshape(len(q), -1), axis=-1, bitorder="little")
    of_a_byte = 8 // kept.bits
    parts = [offset[:, place::of_a_byte] << place * kept.bits for place in range(of_a_byte)]
    return reduce(np.bitwise_or, parts)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[rows, columns]`` of ``packed [rows, columns * bits / 8]``: what stands in each column's bits."""
    if bits == 8:
        return packed
    if 8 % bits:
        columns = np.unpackbits(packed, axis=-1, bitorder="little").reshape(len(packed), -1, bits)
        return np.packbits(columns, axis=-1, bitorder="little")[..., 0]
    parts = [packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(packed), -1)


def _columns(blocks: np.ndarray, columns: int) -> np.ndarray:
    return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, :columns])
