"""One expert computed in fp32, with its weights as in the checkpoint or as stored in a format."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from rq_compile.architectures.activation import activate
from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights, Projection
from rq_compile.quantization.formats import SLOT_FORMATS, Block, Format
from rq_compile.quantization.gptq import Rounded
from rq_compile.quantization.packing import dequantize
from rq_compile.quantization.quantizer import carried, rounded_by_moment, stored, torch_tensor
from rq_compile.quantization.second_moment import block_products
from rq_compile.quantization.weight_sums import squared_difference, squared_half_error

# Outputs of the up projection held at a time: 16 MiB in fp32.
CHUNK = 2**22
# Rows of a matrix that are cast at a time, so that they stay in a cache.
ROWS_CAST = 128
# Of the up and of the down matrix.
Squares = tuple[float, float]
# fp32 values, or what GPTQ has rounded.
Matrix = np.ndarray | Rounded


@dataclass(frozen=True)
class StoredExpert:
    """An expert as a format stores it: ``up [F, hidden]``, ``down [hidden, intermediate]``; biases as in ``ExpertWeights``."""

    up: Matrix
    down: Matrix
    up_bias: np.ndarray | None
    down_bias: np.ndarray | None


def in_fp32(weights: ExpertWeights, into: ExpertWeights | None = None) -> ExpertWeights:
    """The expert with matrices in fp32. ``into`` has matrices that may be overwritten with them."""
    if into is None or weights.up.dtype == weights.down.dtype == np.float32:
        return replace(weights, up=stored(weights.up, "fp32"), down=stored(weights.down, "fp32"))
    for matrix, values in ((weights.up, into.up), (weights.down, into.down)):
        torch.from_numpy(values).copy_(torch_tensor(matrix))
    return replace(weights, up=into.up, down=into.down)


def in_format(
    original: ExpertWeights, squares: Squares, format: Format, most: Block = 128, *, threads: int = 1
) -> tuple[StoredExpert, float]:
    """The expert as ``format`` stores it, and its ``weight_error``.

    The values are exactly as the checkpoint stores them if the format can hold that. Otherwise they are rounded, with the
    expert's moments if it has any; if nothing is rounded to the format, the error is infinite. Biases stay unchanged. ``squares``
    are ``weight_squares(original)``. For ``most`` and ``threads``, see ``quantize``.
    """

    def matrix(projection: Projection) -> tuple[Matrix, float]:
        weights: np.ndarray = getattr(original, projection)
        moment = getattr(original, f"{projection}_moment")
        held = carried(getattr(original, f"{projection}_numbers"), format, most)
        if held is None and SLOT_FORMATS[format].only_carried:
            return weights, math.inf
        if held is None and moment is not None and SLOT_FORMATS[format].quantized:
            return rounded_by_moment(weights, format, moment, most, threads=threads)
        values = stored(weights, format, None, most) if held is None else dequantize(held, format, weights.shape[1])
        return values, squared_difference(values, weights, threads)

    with np.errstate(over="ignore"):  # beyond fp16's range is infinity
        (up, changed_up), (down, changed_down) = matrix("up"), matrix("down")
    stored_expert = StoredExpert(up, down, original.up_bias, original.down_bias)
    return stored_expert, weight_error((changed_up, changed_down), squares)


def cast_error(original: ExpertWeights, squares: Squares, format: Format, threads: int = 1) -> float:
    """The ``weight_error`` of ``in_format`` for a ``format`` that is not quantized, without holding the values."""

    def change(matrix: np.ndarray) -> float:
        if format == "fp16":
            return squared_half_error(matrix, threads)
        pieces = (matrix[start : start + ROWS_CAST] for start in range(0, len(matrix), ROWS_CAST))
        return sum(squared_difference(stored(piece, format), piece) for piece in pieces)

    return weight_error((change(original.up), change(original.down)), squares)


def weight_squares(weights: ExpertWeights, threads: int = 1) -> Squares:
    """Sums of squares of the up and of the down matrix, in fp32."""
    return squared_difference(weights.up, threads=threads), squared_difference(weights.down, threads=threads)


def weight_error(changes: Squares, squares: Squares) -> float:
    """``||W' - W||**2 / ||W||**2`` of the up plus that of the down matrix, from sums of squares of both. It is 0 exactly where
    nothing changed, and infinite where a changed weight is."""
    total = sum(change / square for change, square in zip(changes, squares, strict=True) if change)
    return total if math.isfinite(total) else math.inf


def expert_outputs(
    x: torch.Tensor, weights: ExpertWeights | StoredExpert, geometry: ExpertGeometry, products: np.ndarray | None = None
) -> torch.Tensor:
    """Outputs ``[n, hidden]`` of ``x [n, hidden]``, everything in fp32 and on the device of ``x``.

    To ``products [blocks, block, block]`` is added what ``block_products`` gives of the down projection's inputs.
    """
    up, down = (_projection(matrix, x.device) for matrix in (weights.up, weights.down))
    up_bias, down_bias = (
        None if bias is None else torch.from_numpy(bias).to(x.device) for bias in (weights.up_bias, weights.down_bias)
    )
    outputs = torch.empty_like(x)
    step = max(1, CHUNK // geometry.up_rows)
    for rows, into in zip(x.split(step), outputs.split(step), strict=True):
        intermediate = activate(up(rows, up_bias), geometry)
        if products is not None:
            products += block_products(intermediate.cpu().numpy(), products.shape[-1])
        into.copy_(down(intermediate, down_bias))
    return outputs


def _projection(matrix: Matrix, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """The function of inputs ``[n, columns]`` and a bias. A CPU multiplies rounded weights as integers, which is faster."""
    if isinstance(matrix, Rounded) and device.type == "cpu":
        return partial(_rounded_linear, matrix)
    values = torch.from_numpy(values_of(matrix)).to(device)
    return lambda x, bias: F.linear(x, values, bias)


def values_of(matrix: Matrix) -> np.ndarray:
    """fp32 ``[rows, columns]``"""
    return matrix.values() if isinstance(matrix, Rounded) else matrix


def _rounded_linear(matrix: Rounded, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    outputs = torch.from_numpy(matrix.times(x.T.numpy(), torch.get_num_threads())).T
    return outputs if bias is None else outputs + bias
