"""Packed codes to numbers, at the speed of memory.

Tables are indexed by two bytes at a time: numpy takes an entry of 4 or 8 bytes as fast as one of 1, so that this is several times
faster than a look-up of every code, and than the casts of ``ml_dtypes``.
"""

from functools import cache

import ml_dtypes
import numpy as np

# e2m1 doubled is a whole number.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
OFFSET_4 = tuple(range(-8, 8))
UNSIGNED_4 = tuple(range(16))
SIGNED_4 = (*range(8), *range(-8, 0))
# Bytes that are looked up at a time: they and what comes of them stay in the cache.
TILE = 1 << 16
NAN_E4M3 = 0x7F


def nibbles(packed: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """int8 ``[rows, 2 * bytes]`` of uint8 ``packed [rows, bytes]``: ``values`` of the low four bits, then of the high ones."""
    result = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    _look_up(packed, _nibble_table(values), result)
    return result


def e4m3(packed: np.ndarray) -> np.ndarray:
    """fp32 of float8_e4m3fn ``packed``, any dtype of one byte; NaN where a code is."""
    result = np.empty(packed.shape, np.float32)
    _look_up(packed, _e4m3_table(), result)
    return result


def has_nan_e4m3(packed: np.ndarray) -> bool:
    return bool(packed.size) and int((packed.view(np.uint8) & NAN_E4M3).max()) == NAN_E4M3


def exponents(codes: np.ndarray) -> np.ndarray:
    """fp32 ``2 ** (code - 127)`` of uint8 ``codes``; NaN for 255."""
    return np.append(np.exp2(np.arange(255, dtype=np.float64) - 127), np.nan).astype(np.float32)[codes.view(np.uint8)]


def words_as_bytes(words: np.ndarray) -> np.ndarray:
    """uint8 ``[rows, 4 * words]`` of int32 ``words``, the lowest byte of each first."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8)


def _look_up(packed: np.ndarray, table: np.ndarray, result: np.ndarray) -> None:
    """Fill contiguous ``result`` with the entries of ``table`` for every two bytes of ``packed``."""
    codes = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)
    even = len(codes) // 2
    pairs, entries = codes[: 2 * even].view("<u2"), result.reshape(-1).view(np.uint8)[: even * table.itemsize].view(table.dtype)
    for start in range(0, even, TILE // 2):
        part = slice(start, start + TILE // 2)
        np.take(table, pairs[part], out=entries[part], mode="clip")
    if len(codes) % 2:
        last = table[codes[-1:].astype(np.uint16)].view(np.uint8)[: table.itemsize // 2]
        result.reshape(-1).view(np.uint8)[-(table.itemsize // 2) :] = last


@cache
def _nibble_table(values: tuple[int, ...]) -> np.ndarray:
    of = np.array(values, np.int8)
    byte = np.stack([np.tile(of, 16), np.repeat(of, 16)], axis=1)
    return _of_pairs(byte.reshape(256, 2))


@cache
def _e4m3_table() -> np.ndarray:
    return _of_pairs(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(256, 1))


def _of_pairs(byte: np.ndarray) -> np.ndarray:
    """``byte [256, ...]`` of each byte, side by side for every pair (the low byte first): one unsigned integer an entry."""
    pairs = np.concatenate([np.tile(byte, (256, 1)), np.repeat(byte, 256, axis=0)], axis=1)
    return np.ascontiguousarray(pairs).view(f"<u{pairs.shape[1] * pairs.itemsize}").reshape(-1)
