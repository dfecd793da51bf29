"""The parts of a checkpoint: named weights, each decoded from the tensors that store it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np

from rq_compile.checkpoint.safetensors_file import DTYPES, StoredTensor, read_rows, read_tensor
from rq_compile.quantization.formats import Format
from rq_compile.quantization.source_numbers import SourceNumbers

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Weight(ABC):
    """A weight with the name and ``shape`` that it has in a checkpoint that was never quantized.

    ``format``: the storage format's name. ``parts``: the tensors that store the weight, by name. ``transposed``: whether they
    store the last two dimensions swapped. Rows are those of the matrix as stored; the matrices of a stack follow each other.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    parts: dict[str, StoredTensor]
    transposed: bool = False

    @property
    def bytes(self) -> int:
        """Bytes as stored, including scales and zero points."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns as stored, with the rows of all matrices of a stack added up."""
        columns = self.shape[-2] if self.transposed else self.shape[-1] if self.shape else 1
        return prod(self.shape) // columns if columns else 0, columns

    @property
    @abstractmethod
    def dtype(self) -> np.dtype:
        """The dtype that ``read`` returns, which holds every decoded value."""

    @abstractmethod
    def decode(self, rows: slice) -> np.ndarray:
        """fp32 ``[rows, columns]``. If the format stores rows one after another, no other rows are read.

        Raises:
            UserError: a tensor cannot be read, or a value or a scale is not finite.
        """

    def source_numbers(self, rows: slice) -> SourceNumbers | None:
        """The numbers (integers or FP8) and scales whose products ``decode`` returns, or None if it is not stored as such.

        Raises:
            UserError: see ``decode``.
        """
        return None

    @property
    def source_group(self) -> int | None:
        """Number of columns that share a scale of ``source_numbers``; None if there are none."""
        return None

    @property
    def slot_format(self) -> Format | None:
        """The slot format that stores weights as this storage format does, if there is one."""
        return None

    def read(self, index: int | None = None) -> np.ndarray:
        """The weight, or slice ``index`` of its first dimension, in ``dtype``.

        Raises:
            UserError: see ``decode``.
        """
        values = self.decode(self.rows_of(index))
        if self.dtype == BF16:
            # bf16 is the upper half of fp32; in weights that decode to it, the lower half is zero.
            values = np.ascontiguousarray(values.view(np.uint16)[..., 1::2]).view(BF16)
        return self.shaped(values, index)

    def rows_of(self, index: int | None) -> slice:
        """The rows of slice ``index`` of the first dimension; all rows for None."""
        if index is None:
            return slice(0, self.matrix_shape[0])
        count = self.matrix_shape[0] // self.shape[0]
        return slice(index * count, (index + 1) * count)

    def shaped(self, rows: np.ndarray, index: int | None) -> np.ndarray:
        """``rows`` (of weights, or of their scales) in the shape of the weight or of its slice ``index``."""
        shape = self.shape if index is None else self.shape[1:]
        if len(shape) < 2:
            return rows.reshape(shape)
        if not self.transposed:
            return rows.reshape(*shape[:-1], rows.shape[-1])
        return np.swapaxes(rows.reshape(*shape[:-2], shape[-1], rows.shape[-1]), -1, -2)


@dataclass(frozen=True, kw_only=True)
class Plain(Weight):
    """A tensor of floats (or an auxiliary tensor of integers), as it is."""

    @property
    def stored(self) -> StoredTensor:
        return next(iter(self.parts.values()))

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.stored.dtype]

    def decode(self, rows: slice) -> np.ndarray:
        return read_rows(self.name, self.stored, rows, self.matrix_shape[0]).astype(np.float32)

    def read(self, index: int | None = None) -> np.ndarray:
        return read_tensor(self.name, self.stored, index)


def plain(name: str, stored: StoredTensor) -> Plain:
    return Plain(name=name, shape=stored.shape, format="plain", parts={name: stored})
