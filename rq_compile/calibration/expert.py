"""One expert computed in fp32, with its weights as in the checkpoint or as stored in a format."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from rq_compile.architectures.activation import activate
from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights, Projection
from rq_compile.quantization.formats import Block, Format
from rq_compile.quantization.packing import dequantize
from rq_compile.quantization.quantizer import carried, stored
from rq_compile.quantization.second_moment import block_products

# Outputs of the up projection held at a time: 16 MiB in fp32.
CHUNK = 2**22
# Rows of a matrix that are compared at a time, so that their difference stays in a cache.
ROWS_COMPARED = 256


def in_format(weights: ExpertWeights, format: Format, most: Block = 128, *, threads: int = 1) -> ExpertWeights:
    """The expert with the fp32 values that its matrices have after they were stored in ``format``: exactly as the checkpoint
    stores them if the format can hold that, else rounded, with its moments if it has any. Biases stay unchanged. ``most``,
    ``threads``: see ``quantize``."""

    def matrix(projection: Projection) -> np.ndarray:
        weights_of: np.ndarray = getattr(weights, projection)
        held = carried(getattr(weights, f"{projection}_integers"), format, most)
        if held is not None:
            return dequantize(held, format, weights_of.shape[1])
        return stored(weights_of, format, getattr(weights, f"{projection}_moment"), most, threads=threads)

    with np.errstate(over="ignore"):  # beyond fp16's range is infinity, which `weight_error` reports
        return replace(weights, up=matrix("up"), down=matrix("down"))


def weight_squares(weights: ExpertWeights) -> tuple[float, float]:
    """Sums of squares of the up and of the down matrix, in fp32."""
    return _square(torch.from_numpy(weights.up)), _square(torch.from_numpy(weights.down))


def weight_error(changed: ExpertWeights, original: ExpertWeights, squares: tuple[float, float]) -> float:
    """``||W' - W||**2 / ||W||**2`` of the up plus that of the down matrix; 0 exactly where nothing changed, infinite where a
    weight of ``changed`` is. Both in fp32; ``squares`` are ``weight_squares(original)``."""
    total = 0.0
    for new, old, square in zip((changed.up, changed.down), (original.up, original.down), squares, strict=True):
        pairs = zip(torch.from_numpy(new).split(ROWS_COMPARED), torch.from_numpy(old).split(ROWS_COMPARED), strict=True)
        changes = sum(_square(some - others) for some, others in pairs)
        if changes:
            total += changes / square
    return total if math.isfinite(total) else math.inf


def expert_outputs(
    x: torch.Tensor, weights: ExpertWeights, geometry: ExpertGeometry, products: np.ndarray | None = None
) -> torch.Tensor:
    """Outputs ``[n, hidden]`` of ``x [n, hidden]``, everything in fp32 and on the device of ``x``.

    To ``products [blocks, block, block]`` is added what ``block_products`` gives of the down projection's inputs.
    """
    up, down = (torch.from_numpy(matrix).to(x.device) for matrix in (weights.up, weights.down))
    up_bias, down_bias = (
        None if bias is None else torch.from_numpy(bias).to(x.device) for bias in (weights.up_bias, weights.down_bias)
    )
    outputs = torch.empty_like(x)
    step = max(1, CHUNK // geometry.up_rows)
    for rows, into in zip(x.split(step), outputs.split(step), strict=True):
        intermediate = activate(F.linear(rows, up, up_bias), geometry)
        if products is not None:
            products += block_products(intermediate.cpu().numpy(), products.shape[-1])
        into.copy_(F.linear(intermediate, down, down_bias))
    return outputs


def _square(matrix: torch.Tensor) -> float:
    """Sum of squares. fp32's range has no room for those of very small or very large values."""
    rows = torch.linalg.vector_norm(matrix, dim=1)
    if not (rows.isfinite().all() and (rows > 2.0**-60).any()):
        rows = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
    return float(rows.double().square().sum())
