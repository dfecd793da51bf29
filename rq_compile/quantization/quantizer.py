"""Rounds weights to a format, to the nearest or by GPTQ. ``packing.py`` defines how they are stored."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import torch

from rq_compile.quantization.formats import SLOT_FORMATS, Block, Format, block_size
from rq_compile.quantization.gptq import Rounded, gptq, gptq_values
from rq_compile.quantization.packing import Quantized, columns_of, packed, stored_scales
from rq_compile.quantization.rounding import holding_scales, nearest
from rq_compile.quantization.second_moment import SecondMoment
from rq_compile.quantization.source_numbers import SourceNumbers

# Number of weights that are rounded to the nearest at a time, so that they stay in the caches.
NEAREST_TILE = 1 << 19


def carried(numbers: SourceNumbers | None, format: Format, most: Block = 128) -> Quantized | None:
    """Numbers of the checkpoint, packed unchanged. None if there are none, or if ``format`` cannot hold them."""
    held = numbers.in_blocks(format, most) if numbers else None
    return None if held is None else Quantized(packed(held[0], format), stored_scales(held[1], format))


def quantize(
    weights: np.ndarray, format: Format, moment: SecondMoment | None = None, most: Block = 128, *, threads: int = 1
) -> Quantized:
    """Round ``weights [rows, columns]`` of any float dtype to the quantized ``format``.

    Weights are rounded to the nearest or, if the second ``moment`` of the matrix's inputs is given, such that the outputs change
    least (GPTQ), on ``threads`` threads. Up to ``most`` weights share a scale, see ``block_size``.

    Raises:
        UserError: a weight is not finite.
    """
    parts, scales = zip(
        *((packed(q, format), scales) for q, scales in _rounded(weights, format, moment, most, threads)), strict=True
    )
    return Quantized(np.concatenate(parts), np.concatenate(scales))


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
        held = torch_tensor(weights)
        if kept.element != "float32":
            held = held.to(getattr(torch, kept.element))
        elif held.dtype == torch.float32:
            return held.numpy()
        # numpy's large arrays, unlike torch's, are in huge pages, which the system hands out much faster.
        values = np.empty(weights.shape, np.float32)
        torch.from_numpy(values).copy_(held)
        return values
    if moment is not None:
        return gptq_values(_in_fp32(weights), format, moment, block_size(weights.shape[1], most), threads)
    rows, columns = weights.shape
    block = block_size(columns, most)
    values, start = np.empty((rows, -(-columns // block), block), np.float32), 0
    for q, scales in _rounded(weights, format, moment, most, threads):
        np.multiply(q, scales[..., None], out=values[start : start + len(q)])
        start += len(q)
    return columns_of(values, columns)


def rounded_by_moment(
    weights: np.ndarray, format: Format, moment: SecondMoment, most: Block = 128, *, threads: int = 1
) -> tuple[Rounded, float]:
    """``weights [rows, columns]`` of any float dtype, rounded to the quantized ``format`` by GPTQ, and the sum of the squared
    changes, which costs little while weights are rounded. For the other arguments, see ``quantize``.

    Raises:
        UserError: a weight is not finite.
    """
    changes = np.zeros(len(weights), np.float64)
    rounded = gptq(_in_fp32(weights), format, moment, block_size(weights.shape[1], most), threads, changes)
    return rounded, float(changes.sum())


def _in_fp32(weights: np.ndarray) -> np.ndarray:
    return torch_tensor(weights).float().numpy()


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
        found = gptq(_in_fp32(weights), format, moment, block_size(weights.shape[1], most), threads)
        needed = -(-found.columns // found.q.shape[-1])  # a moment may be padded to more
        yield found.q[:, :needed], found.scales[:, :needed]
        return
    rows = max(1, NEAREST_TILE // weights.shape[1])
    for start in range(0, max(1, len(weights)), rows):
        blocks = _blocks(weights[start : start + rows], most)
        scales = holding_scales(blocks, format)
        yield nearest(blocks, scales, format), scales


def _blocks(weights: np.ndarray, most: Block) -> np.ndarray:
    """fp32 ``[rows, blocks, block]``, with the last block of a row padded with zeros."""
    rows, columns = weights.shape
    block = block_size(columns, most)
    values = weights.astype(np.float32)
    if columns % block:
        values = np.pad(values, ((0, 0), (0, -columns % block)))
    return values.reshape(rows, -1, block)
