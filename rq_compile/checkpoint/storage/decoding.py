"""Decodes the codes of a matrix, in any packing, at the speed of memory, with ``rq_decode`` of ``plugins/quantizer``."""

import ctypes
from dataclasses import dataclass

import numpy as np

from rq_compile.checkpoint.safetensors_file import StoredTensor, read_rows
from rq_compile.checkpoint.storage.packings import Packing
from rq_compile.quantization.library import quantizer_function

NOT_FINITE, OUT_OF_RANGE, OUTSIDE = 1, 2, 3  # return values of ``rq_decode`` besides 0


@dataclass(frozen=True)
class Codes:
    """Some rows of a matrix of codes: ``words`` as in the tensor, ``rows`` rows from ``first`` on, with ``columns`` columns."""

    packing: Packing
    words: np.ndarray
    first: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Groups:
    """``scales`` and ``zeros`` fp32 ``[rows, groups]``. A group has ``width`` consecutive columns, or the columns that ``order``,
    int64 ``[columns]``, assigns to it."""

    width: int
    scales: np.ndarray
    zeros: np.ndarray | None = None
    order: np.ndarray | None = None


def read_codes(packing: Packing, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> Codes:
    """``rows`` of the matrix of shape ``shape`` that ``tensor``, called ``name``, stores. If possible, no other rows are read.

    Raises:
        UserError: the file cannot be read.
    """
    words_down = -(-shape[0] // packing.rows)
    if packing.down:
        words = read_rows(name, tensor, slice(0, words_down), words_down).reshape(-1, words_down)
        return Codes(packing, words, rows.start, rows.stop - rows.start, shape[1])
    first = rows.start // packing.rows
    words = read_rows(name, tensor, slice(first, -(-rows.stop // packing.rows)), words_down)
    return Codes(packing, words, rows.start - first * packing.rows, rows.stop - rows.start, shape[1])


def scaled(codes: Codes, groups: Groups) -> np.ndarray | None:
    """fp32 ``[rows, columns]``: ``(number - zero) * scale``; None if a code is NaN."""
    values = np.empty((codes.rows, codes.columns), np.float32)
    return None if _decode(codes, groups, values) == NOT_FINITE else values


def differences(codes: Codes, groups: Groups | None = None) -> np.ndarray | None:
    """int8 ``[rows, columns]`` of integer codes: ``number - zero``; None if a difference does not fit."""
    numbers = np.empty((codes.rows, codes.columns), np.int8)
    return None if _decode(codes, groups, numbers) == OUT_OF_RANGE else numbers


def read_differences(packing: Packing, name: str, tensor: StoredTensor, shape: tuple[int, int], rows: slice) -> np.ndarray:
    """int8 ``[rows, columns]``: ``rows`` of the integers of shape ``shape`` that ``tensor`` stores.

    Raises:
        UserError: the file cannot be read.
    """
    numbers = differences(read_codes(packing, name, tensor, rows, shape))
    assert numbers is not None
    return numbers


def _decode(codes: Codes, groups: Groups | None, result: np.ndarray) -> int:
    """Fill ``result [rows, columns]``, fp32 or int8. Returns 0, ``NOT_FINITE`` or ``OUT_OF_RANGE``."""
    packing, words = codes.packing, np.ascontiguousarray(codes.words)
    shifts = packing.shifts
    across = words.view(np.uint8).shape[1] // packing.word
    shape = (codes.rows, groups.scales.shape[1] if groups else 1)
    scales = _contiguous(groups.scales, shape, np.float32) if groups else None
    zeros = _contiguous(groups.zeros, shape, np.float32) if groups and groups.zeros is not None else None
    order = _contiguous(groups.order, (codes.columns,), np.int32) if groups and groups.order is not None else None
    matrix = _Codes(
        *(_address(words), words.nbytes // packing.word, packing.word, packing.rows, packing.columns),
        *((1, across) if packing.down else (across, 1)),
        *(packing.bits, _address(shifts), _address(packing.numbers)),
        *(codes.first, codes.rows, codes.columns, groups.width if groups else codes.columns, shape[1]),
        *(_address(order), _address(scales), _address(zeros)),
        *((_address(result), None) if result.dtype == np.float32 else (None, _address(result))),
    )
    status = quantizer_function("rq_decode")(ctypes.byref(matrix))
    if status == OUTSIDE:
        raise IndexError(f"{words.shape} words and {shape} scales are not those of {codes.rows} x {codes.columns} codes")
    return status


def _contiguous(array: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(array, shape), dtype)


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class _Codes(ctypes.Structure):
    """``Codes`` of plugins/quantizer/src/decode.h."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("word_count", "word_bytes", "rows_in_word", "columns_in_word")),
        *((name, ctypes.c_int64) for name in ("row_step", "column_step", "bits")),
        *((name, ctypes.c_void_p) for name in ("shifts", "numbers")),
        *((name, ctypes.c_int64) for name in ("first", "rows", "columns", "width", "groups")),
        *((name, ctypes.c_void_p) for name in ("order", "scales", "zeros", "values", "differences")),
    )
