"""Packed weights, bit by bit as their definitions say."""

import numpy as np
import pytest

from rq_compile.quantization.formats import BLOCK_FORMATS, PACKED_FORMATS, Format
from rq_compile.quantization.packing import Quantized, packed, packed_codes, unpacked, whole_numbers
from rq_compile.rewrite.panels import ROWS, packed_panels

# The columns whose codes are in a word's 32 bits, from the lowest bits on. (int3: see the kernels' tests.)
COLUMNS_OF_A_WORD = {
    8: [0, 1, 2, 3],
    4: [0, 4, 1, 5, 2, 6, 3, 7],
    2: [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
}


def from_bits(lowest_first: list[int], bits: int) -> list[int]:
    """The bytes in which the codes follow each other bit by bit."""
    whole = sum(code << bits * place for place, code in enumerate(lowest_first))
    return list(whole.to_bytes(len(lowest_first) * bits // 8, "little"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 16), (5, 200)])
def test_codes_follow_each_other_bit_by_bit(bits: int, rows: int, columns: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    found = packed_codes(codes, bits)
    assert found.dtype == np.uint8
    assert found.tolist() == [from_bits(row, bits) for row in codes.tolist()]
    assert np.array_equal(unpacked(found, bits), codes)
    # Every second row and column of a larger array.
    spread = np.repeat(np.repeat(codes, 2, axis=0), 2, axis=1)
    assert np.array_equal(packed_codes(spread[::2, ::2], bits), found)
    assert np.array_equal(unpacked(np.repeat(found, 2, axis=0)[::2], bits), codes)
    assert np.array_equal(unpacked(np.asfortranarray(found), bits), codes)


@pytest.mark.parametrize("format", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_every_number_of_a_format(format: Format, dtype: type) -> None:
    kept = BLOCK_FORMATS[format]
    numbers: np.ndarray = np.resize(np.arange(kept.least, kept.greatest + 1), (2, 2, 256)).astype(dtype)
    codes = packed(numbers, format)
    assert np.array_equal(
        unpacked(codes, kept.bits), (numbers.astype(np.int16) + kept.zero_point).astype(np.uint8).reshape(2, -1)
    )
    assert np.array_equal(whole_numbers(Quantized(codes, np.ones((2, 2), np.float32)), format), numbers.reshape(2, -1))


@pytest.mark.parametrize("format", [format for format, kept in PACKED_FORMATS.items() if kept.bits in COLUMNS_OF_A_WORD])
@pytest.mark.parametrize(("rows", "halves"), [(16, 1), (48, 1), (5, 1), (32, 2), (64, 2), (10, 2)])
def test_panels_of_16_rows(format: Format, rows: int, halves: int) -> None:
    """A line of a panel has a word of each row; panels of both halves alternate, and the last of each is padded with zeros."""
    bits, columns = PACKED_FORMATS[format].bits, 64
    codes = np.random.default_rng(rows).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    panels = packed_panels(Quantized(packed_codes(codes, bits), np.ones((rows, 1), np.float32)), format, halves)

    of_half = codes.reshape(halves, -1, columns)
    of_half = np.concatenate([of_half, np.zeros((halves, -of_half.shape[1] % ROWS, columns), np.uint8)], axis=1)
    wanted = [
        [
            [byte for row in half[first : first + ROWS] for byte in from_bits([row[start + i] for i in order], bits)]
            for start in range(0, columns, len(order))
        ]
        for first in range(0, of_half.shape[1], ROWS)
        for half in of_half.tolist()
        for order in [COLUMNS_OF_A_WORD[bits]]
    ]
    assert panels.tolist() == wanted
