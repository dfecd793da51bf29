"""How the codes of a matrix are packed into its tensor, and the number for each code."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

UNSIGNED_4 = np.arange(16, dtype=np.int8)
UNSIGNED_8 = np.arange(-128, 128).astype(np.int8)  # minus 128, like its zero points
SIGNED_4 = ((np.arange(16) ^ 8) - 8).astype(np.int8)
SIGNED_8 = np.arange(256).astype(np.uint8).view(np.int8)
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the rows in a word, from its lowest bits on


@dataclass(frozen=True, eq=False)
class Packing:
    """Codes of ``bits`` bits in words of ``word`` bytes. A word holds ``rows`` rows or ``columns`` columns; one of the two is 1.

    ``numbers``: the number for each code, int8 ``[2 ** bits]``, in multiples of ``unit``. With 8 bits, they are consecutive
    modulo
    256. None means that the codes are float8_e4m3fn. ``order``: the rows of a word, from its lowest bits on, if they are not in
    order. ``down``: words are ``[columns, rows]`` in the tensor.
    """

    bits: int
    numbers: np.ndarray | None
    word: int = 1
    rows: int = 1
    columns: int = 1
    order: tuple[int, ...] | None = None
    down: bool = False
    unit: float = 1.0

    @property
    def whole_numbers(self) -> bool:
        return self.numbers is not None

    @property
    def shifts(self) -> np.ndarray:
        """int32 ``[rows]``: the lowest bit of each row's code."""
        return np.argsort(self.order or range(self.rows)).astype(np.int32) * np.int32(self.bits)


# float8_e4m3fn, one byte per weight.
E4M3 = Packing(8, None)
# float4_e2m1, with the even column in the low four bits.
E2M1_PAIRS = Packing(4, E2M1_DOUBLED, columns=2, unit=0.5)
INT8 = Packing(8, SIGNED_8)
# Signed numbers of two rows per byte, with the even row in the low four bits (ModelOpt's INT4 AWQ).
ROW_PAIRS = Packing(4, SIGNED_4, rows=2)
# AWQ (gemm): eight rows per word.
AWQ_WORDS = Packing(4, UNSIGNED_4, word=4, rows=8, order=AWQ_ORDER, down=True)


def offset_words(bits: int, *, of_rows: bool = False) -> Packing:
    """int32 words along a row or, if ``of_rows``, down a column. ``2 ** (bits - 1)`` is added to each stored number."""
    numbers = (np.arange(2**bits) - 2 ** (bits - 1)).astype(np.int8)
    return Packing(bits, numbers, word=4, rows=32 // bits) if of_rows else Packing(bits, numbers, word=4, columns=32 // bits)


def column_words(bits: int) -> Packing:
    """GPTQ: int32 ``[columns * bits / 32, rows]``, with words along a row and unsigned numbers; with 8 bits, minus 128."""
    return Packing(bits, UNSIGNED_4 if bits == 4 else UNSIGNED_8, word=4, columns=32 // bits, down=True)


def zero_words(bits: int, taken_off: int) -> Packing:
    """GPTQ's zero points: int32 ``[groups, rows * bits / 32]``, stored minus ``taken_off``. The numbers are like its codes'."""
    return Packing(bits, np.roll(UNSIGNED_4 if bits == 4 else UNSIGNED_8, -taken_off), word=4, rows=32 // bits, down=True)
