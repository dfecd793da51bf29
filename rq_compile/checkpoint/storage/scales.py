"""The scales of a quantized weight: which rows and columns share one, and their values in fp32."""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from rq_compile.checkpoint.safetensors_file import DTYPES, StoredTensor, read_rows
from rq_compile.checkpoint.storage.packings import E4M3_VALUES
from rq_compile.errors import UserError

EXPONENTS = ("U8", "F8_E8M0")  # the dtypes of scales that are powers of two
EXPONENT_DTYPES = tuple(DTYPES[dtype] for dtype in EXPONENTS)
FLOATS = ("F32", "BF16", "F16", "F8_E4M3", *EXPONENTS)
# What each code of one byte is worth: a look-up is many times faster than a cast of ``ml_dtypes``.
POWERS_OF_TWO = np.append(np.exp2(np.arange(255, dtype=np.float64) - 127), np.nan).astype(np.float32)
OF_CODES = {**dict.fromkeys(EXPONENT_DTYPES, POWERS_OF_TWO), DTYPES["F8_E4M3"]: E4M3_VALUES}
# Rows and columns of the blocks that are in use.
SQUARES, RUNS = ((128, 128), (64, 64), (32, 32), (16, 16)), ((1, 128), (1, 64), (1, 32), (1, 16))
BLOCKS = (*SQUARES, *RUNS)
# The product of the largest code of any format and a scale below this is finite.
GREATEST = 2.0**116


@dataclass(frozen=True)
class Scales:
    """A grid of scales over a stack of matrices: ``height`` rows and ``width`` columns of a matrix share one scale.

    ``tensor``, called ``name``, holds ``grid`` scales (matrices, rows, columns); if ``transposed``, with rows and columns
    swapped. ``factor``: a tensor with one number, or one number per matrix, that multiplies all scales (or divides them, if
    ``divides``).
    """

    name: str
    tensor: StoredTensor
    grid: tuple[int, int, int]
    matrix_rows: int
    height: int
    width: int
    transposed: bool = False
    factor: tuple[str, StoredTensor] | None = None
    divides: bool = False

    @property
    def powers_of_two(self) -> bool:
        return self.tensor.dtype in EXPONENTS and self.factor is None

    def read(self, rows: slice) -> np.ndarray:
        """fp32 ``[rows, ceil(columns / width)]``.

        Raises:
            UserError: a scale is not finite, or so large that weights would not be finite.
        """
        matrices, high, wide = self.grid
        if self.transposed:
            values = as_fp32(read_rows(self.name, self.tensor, slice(0, wide), wide)).reshape(wide, high).T[rows]
        else:
            row = np.arange(rows.start, rows.stop)
            of_grid = (row // self.matrix_rows % matrices) * high + row % self.matrix_rows // self.height
            first, last = (int(of_grid[0]), int(of_grid[-1]) + 1) if len(row) else (0, 0)
            stored = as_fp32(read_rows(self.name, self.tensor, slice(first, last), matrices * high)).reshape(-1, wide)
            values = stored if len(stored) == len(row) else stored[of_grid - first]
        if self.factor is not None:
            values = self._with_factor(values, rows)
        if not (np.abs(values) <= GREATEST).all():  # nor is a NaN
            raise UserError(f"{self.name} in {self.tensor.file} has a scale that is infinite or too large; repair the checkpoint")
        return np.ascontiguousarray(values, np.float32)

    def _with_factor(self, values: np.ndarray, rows: slice) -> np.ndarray:
        assert self.factor is not None
        name, tensor = self.factor
        count = prod(tensor.shape)
        factors = as_fp32(read_rows(name, tensor, slice(0, count), count)).reshape(-1)
        of_row = factors[np.arange(rows.start, rows.stop) // self.matrix_rows % count][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            return values / of_row if self.divides else values * of_row


def as_fp32(stored: np.ndarray) -> np.ndarray:
    """Scales of any stored dtype; uint8 are exponents."""
    return OF_CODES[stored.dtype].take(stored.view(np.uint8)) if stored.dtype in OF_CODES else stored.astype(np.float32)


def grid_of(
    name: str,
    tensor: StoredTensor,
    weight: tuple[int, ...],
    format: str,
    stated: tuple[int, int] | None = None,
    dtypes: tuple[str, ...] = FLOATS,
) -> Scales:
    """The grid of ``tensor``, the scales of a weight of shape ``weight``: one scale, one per matrix, one per row, or a grid of
    blocks. The block size follows from the grid: the ``stated`` one if it fits, otherwise the first of ``BLOCKS`` that fits.

    Raises:
        UserError: no block gives a grid of that shape, or the dtype is not one of scales.
    """
    check_dtype(name, tensor, dtypes, format)
    *stack, rows, columns = weight
    matrices, shape = prod(stack), tensor.shape
    if prod(shape) == 1:
        grid: tuple[int, int, int] = (1, 1, 1)
    elif stack and shape in ((matrices,), (matrices, 1)):
        grid = (matrices, 1, 1)
    elif stack and shape == (matrices, rows):
        grid = (matrices, rows, 1)
    elif not stack and len(shape) == 1:
        grid = (1, shape[0], 1)
    elif len(shape) == len(weight) and list(shape[:-2]) == stack:
        grid = (matrices, shape[-2], shape[-1])
    else:
        raise _no_grid(name, tensor, weight, format)
    if grid[1:] == (1, 1):
        height, width = rows, columns
    elif grid[1:] == (rows, 1):
        height, width = 1, columns
    else:
        fits = lambda block: (-(-rows // block[0]), -(-columns // block[1])) == grid[1:]  # noqa: E731
        found = next(filter(fits, (*([stated] if stated else []), *BLOCKS)), None)
        if found is None:
            raise _no_grid(name, tensor, weight, format)
        height, width = found
    return Scales(name, tensor, grid, rows, height, width)


def in_groups(
    name: str, tensor: StoredTensor, weight: tuple[int, ...], group: int, format: str, dtypes: tuple[str, ...]
) -> Scales:
    """Scales that are shared by ``group`` columns of a row.

    Raises:
        UserError: their shape or dtype is wrong.
    """
    check_dtype(name, tensor, dtypes, format)
    *stack, rows, columns = weight
    expected = (*weight[:-1], -(-columns // group))
    if tensor.shape != expected:
        raise wrong_shape(name, tensor, expected, f"{format} with one scale per {group} of {columns} columns")
    return Scales(name, tensor, (prod(stack), rows, expected[-1]), rows, 1, group)


def scaled_by(scales: Scales, name: str, factor: StoredTensor, *, divides: bool) -> Scales:
    matrices = scales.grid[0]
    if prod(factor.shape) not in (1, matrices):
        raise wrong_shape(name, factor, (1,), "one number for the whole weight")
    check_dtype(name, factor, ("F32", "BF16", "F16"), "its global scale")
    return replace(scales, factor=(name, factor), divides=divides)


def check_dtype(name: str, tensor: StoredTensor, dtypes: tuple[str, ...], format: str) -> None:
    if tensor.dtype not in dtypes:
        raise UserError(
            f"{name} in {tensor.file} is stored as {tensor.dtype}, but {format} has {' or '.join(dtypes)}; "
            "save the checkpoint again with the tool that quantized it",
            2,
        )


def check_kind(name: str, codes: StoredTensor, stated: bool | None, *, floats: bool) -> None:
    """``stated``: see ``Stated.floats``.

    Raises:
        UserError: the codes are ``floats`` (or not), but the opposite is stated.
    """
    if stated is not None and stated != floats:
        kinds = ("floats", "whole numbers") if stated else ("whole numbers", "floats")
        raise UserError(
            f"{name} in {codes.file} is stated to be quantized to {kinds[0]}, but is stored as {codes.dtype}, like {kinds[1]}; "
            "save the checkpoint again with the tool that quantized it",
            2,
        )


def wrong_shape(name: str, tensor: StoredTensor, expected: tuple[int, ...], what: str) -> UserError:
    return UserError(
        f"{name} in {tensor.file} has shape {list(tensor.shape)}, but {list(expected)} is expected of {what}; "
        "save the checkpoint again with the tool that quantized it",
        2,
    )


def _no_grid(name: str, tensor: StoredTensor, weight: tuple[int, ...], format: str) -> UserError:
    return UserError(
        f"{name} in {tensor.file} has shape {list(tensor.shape)}, which is not a grid of scales over a weight {list(weight)} "
        f"stored as {format}; save the checkpoint again with the tool that quantized it",
        2,
    )
