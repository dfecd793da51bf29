"""How the codes of a matrix are packed into its tensor: each packing gives some rows as numbers."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rq_compile.checkpoint.safetensors_file import StoredTensor, read_rows, require_finite
from rq_compile.checkpoint.storage.codes import (
    E2M1_DOUBLED,
    OFFSET_4,
    SIGNED_4,
    UNSIGNED_4,
    e4m3,
    has_nan_e4m3,
    nibbles,
    words_as_bytes,
)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns that a word holds, from its lowest bits on
WORDS_AT_ONCE = 1 << 15  # so that they stay in the cache


class Packing(Protocol):
    """``bits`` of a code; ``whole_numbers``: whether ``numbers`` are, of ``unit`` each."""

    @property
    def bits(self) -> int: ...
    @property
    def whole_numbers(self) -> bool: ...
    @property
    def unit(self) -> float: ...

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        """int8 or fp32 ``[rows, columns]`` of the matrix of ``shape`` that ``tensor``, called ``name``, stores."""
        ...


@dataclass(frozen=True)
class E4m3:
    """float8_e4m3fn, a byte a weight."""

    bits: int = 8
    whole_numbers: bool = False
    unit: float = 1.0

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        codes = read_rows(name, tensor, rows, shape[0])
        require_finite(name, tensor, not has_nan_e4m3(codes))
        return e4m3(codes.reshape(-1, shape[1]))


@dataclass(frozen=True)
class E2m1Pairs:
    """float4_e2m1, the even column in the low four bits; ``numbers`` are its doubles."""

    bits: int = 4
    whole_numbers: bool = True
    unit: float = 0.5

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        packed = read_rows(name, tensor, rows, shape[0]).reshape(-1, shape[1] // 2)
        return nibbles(packed, E2M1_DOUBLED)


@dataclass(frozen=True)
class Int8:
    bits: int = 8
    whole_numbers: bool = True
    unit: float = 1.0

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        return read_rows(name, tensor, rows, shape[0]).reshape(-1, shape[1])


@dataclass(frozen=True)
class OffsetWords:
    """int32 words along a row, the first weight in the lowest bits, each plus ``2 ** (bits - 1)``."""

    bits: int
    whole_numbers: bool = True
    unit: float = 1.0

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        return self.of_words(read_rows(name, tensor, rows, shape[0]), shape[1])

    def of_words(self, words: np.ndarray, count: int) -> np.ndarray:
        """int8 ``[rows, count]`` of ``words [rows, words]``."""
        packed = words_as_bytes(words)
        numbers = nibbles(packed, OFFSET_4) if self.bits == 4 else (packed ^ np.uint8(128)).view(np.int8)
        return numbers[:, :count]


@dataclass(frozen=True)
class RowPairs:
    """Signed 4-bit numbers of two rows in a byte, the even row in the low four bits (ModelOpt's INT4 AWQ)."""

    bits: int = 4
    whole_numbers: bool = True
    unit: float = 1.0

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        first, last = rows.start // 2, -(-rows.stop // 2)
        packed = read_rows(name, tensor, slice(first, last), shape[0] // 2)
        pairs = nibbles(packed, SIGNED_4).reshape(len(packed), shape[1], 2)
        matrix = np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(-1, shape[1])
        return matrix[rows.start - 2 * first : rows.stop - 2 * first]


@dataclass(frozen=True)
class ColumnWords:
    """GPTQ: int32 ``[columns * bits / 32, rows]``, a word along a row, without a sign; the zero points have one taken off."""

    bits: int
    whole_numbers: bool = True
    unit: float = 1.0

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        words = read_rows(name, tensor, slice(0, tensor.shape[0]), tensor.shape[0])[:, rows]
        return unsigned(transposed(words), self.bits)


@dataclass(frozen=True)
class AwqWords:
    """AWQ (gemm): int32 ``[columns, rows / 8]``, eight rows in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    bits: int = 4
    whole_numbers: bool = True
    unit: float = 1.0

    def numbers(self, name: str, tensor: StoredTensor, rows: slice, shape: tuple[int, int]) -> np.ndarray:
        first, last = rows.start // 8, -(-rows.stop // 8)
        words = read_rows(name, tensor, slice(0, tensor.shape[0]), tensor.shape[0])[:, first:last]
        return awq_rows(words)[rows.start - 8 * first : rows.stop - 8 * first]


def unsigned(words: np.ndarray, bits: int) -> np.ndarray:
    """int8 ``[rows, 32 / bits * words]`` of int32 ``words [rows, words]``, the first in the lowest bits; of 8 bits, less 128."""
    packed = words_as_bytes(words)
    return nibbles(packed, UNSIGNED_4) if bits == 4 else (packed ^ np.uint8(128)).view(np.int8)


def awq_rows(words: np.ndarray) -> np.ndarray:
    """int8 ``[8 * words, rows]`` of AWQ's ``words [rows, words]``, in the order of the columns."""
    by_word = transposed(words)
    result = np.empty((len(by_word), 8, by_word.shape[1]), np.int8)
    step = max(1, WORDS_AT_ONCE // max(1, by_word.shape[1]))
    for start in range(0, len(by_word), step):
        part = slice(start, start + step)
        for place, column in enumerate(AWQ_ORDER):
            number = by_word[part] >> np.int32(4 * place)
            number &= 15
            result[part, column] = number
    return result.reshape(-1, by_word.shape[1])


def transposed(matrix: np.ndarray) -> np.ndarray:
    """Contiguous. By torch, which goes by tiles: numpy is 5 to 7 times slower."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(matrix)).t().contiguous().numpy()
