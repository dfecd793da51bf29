"""Weights in a format: quantized, packed as the engines read them, and decoded again.

``BlockFormat`` defines q and the scales. When packed, q is offset by the format's zero point. The columns of a row follow each
other bit by bit, with the first in the lowest bits of the first byte, as ONNX Runtime's ``MatMulNBits`` reads them.
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

# Number of weights that are rounded to the nearest at a time, so that they stay in the caches.
NEAREST_TILE = 1 << 19


@dataclass(frozen=True)
class Quantized:
    """``packed`` uint8 ``[rows, blocks * block * bits / 8]`` and ``scales`` fp32 ``[rows, blocks]``."""

    packed: np.ndarray
    scales: np.ndarray


def carried(integers: SourceIntegers | None, format: Format, most: Block = 128) -> Quantized | None:
    """Integers of the checkpoint, packed unchanged. None if there are none, or if ``format`` cannot hold them."""
    held = integers.in_blocks(format, most) if integers else None
    return None if held is None else Quantized(_pack(held[0], format), held[1])


def quantize(
    weights: np.ndarray, format: Format, moment: SecondMoment | None = None, most: Block = 128, *, threads: int = 1
) -> Quantized:
    """Round ``weights [rows, columns]`` of any float dtype to the quantized ``format``.

    Weights are rounded to the nearest or, if the second ``moment`` of the matrix's inputs is given, such that the outputs change
    least (GPTQ), on ``threads`` threads. Up to ``most`` weights share a scale, see ``block_size``.

    Raises:
        UserError: a weight is not finite.
    """
    packed, scales = zip(
        *((_pack(q, format), scales) for q, scales in _rounded(weights, format, moment, most, threads)), strict=True
    )
    return Quantized(np.concatenate(packed), np.concatenate(scales))


def stored(
    weights: np.ndarray, format: Format, moment: SecondMoment | None = None, most: Block = 128, *, threads: int = 1
) -> np.ndarray:
    """fp32 ``[rows, columns]``: the values of ``weights`` after they are stored in ``format``. For the other arguments, see
    ``quantize``.

    Raises:
        UserError: a weight that is quantized is not finite.
    """
    kept = SLOT_FORMATS[format]
    if not kept.quantized:
        return torch_tensor(weights).to(getattr(torch, kept.element)).float().numpy()
    values = [
        torch.from_numpy(q) * torch.from_numpy(scales)[..., None]
        for q, scales in _rounded(weights, format, moment, most, threads)
    ]
    return _columns((values[0] if len(values) == 1 else torch.cat(values)).numpy(), weights.shape[1])


def torch_tensor(array: np.ndarray) -> torch.Tensor:
    """A torch tensor that shares the array's memory if the array is writable; otherwise a copy."""
    array = array if array.flags.writeable else array.copy()
    return (
        torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        if array.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(array)
    )


def _rounded(
    weights: np.ndarray, format: Format, moment: SecondMoment | None, most: Block, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Integers ``[rows, blocks, block]`` and scales ``[rows, blocks]``, for some rows at a time."""
    if moment is not None:
        yield gptq(torch_tensor(weights).float().numpy(), format, moment, block_size(weights.shape[1], most), threads)
        return
    rows = max(1, NEAREST_TILE // weights.shape[1])
    for start in range(0, max(1, len(weights)), rows):
        blocks = _blocks(weights[start : start + rows], most)
        scales = holding_scales(blocks, format)
        yield nearest(blocks, scales, format), scales


def whole_numbers(quantized: Quantized, format: Format) -> np.ndarray:
    """int8 ``[rows, blocks * block]``: the numbers q that ``quantize`` packed, before multiplication by the scale."""
    kept = BLOCK_FORMATS[format]
    return (unpacked(quantized.packed, kept.bits) - np.uint8(kept.zero_point)).view(np.int8)


def dequantize(quantized: Quantized, format: Format, columns: int) -> np.ndarray:
    """fp32 ``[rows, columns]``: the values of the weights that ``quantize`` packed."""
    q = whole_numbers(quantized, format).reshape(*quantized.scales.shape, -1)
    return _columns(q * quantized.scales[..., None], columns)


def _blocks(weights: np.ndarray, most: Block) -> np.ndarray:
    """fp32 ``[rows, blocks, block]``, with the last block of a row padded with zeros."""
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
    """uint8 ``[rows, columns]`` from ``packed [rows, columns * bits / 8]``: the number in each column's bits."""
    if bits == 8:
        return packed
    if 8 % bits:
        columns = np.unpackbits(packed, axis=-1, bitorder="little").reshape(len(packed), -1, bits)
        return np.packbits(columns, axis=-1, bitorder="little")[..., 0]
    parts = [packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(packed), -1)


def _columns(blocks: np.ndarray, columns: int) -> np.ndarray:
    return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, :columns])
