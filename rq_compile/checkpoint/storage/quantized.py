"""A quantized weight: packed codes, scales, and where the format has them zero points and an order of the columns."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rq_compile.checkpoint.storage.packings import Packing
from rq_compile.checkpoint.storage.scales import Scales
from rq_compile.checkpoint.storage.weight import BF16, Weight
from rq_compile.quantization.source_integers import SourceIntegers

# Values that are scaled at a time: they stay in the cache.
TILE = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Quantized(Weight):
    """``(number - zero) * scale``, times ``column_scale`` where a quantizer has moved scales of the inputs into the weights.

    ``packed``: the part that holds the codes. ``zeros(rows)``: fp32 ``[rows, groups]``. ``order()``: the group of each column,
    int64 ``[columns]``, or None where groups follow each other. ``column_scale()``: fp32 ``[columns]``.
    """

    packed: str
    packing: Packing
    scales: Scales
    zeros: Callable[[slice], np.ndarray] | None = None
    order: Callable[[], np.ndarray | None] | None = None
    column_scale: Callable[[], np.ndarray] | None = None

    @property
    def dtype(self) -> np.dtype:
        """bf16 where a code of few bits is multiplied by a power of two, which loses nothing."""
        plain = self.zeros is None and self.column_scale is None
        return BF16 if plain and self.packing.bits <= 8 and self.scales.powers_of_two else np.dtype(np.float32)

    def decode(self, rows: slice) -> np.ndarray:
        numbers, scales = self._numbers(rows), self.scales.read(rows) * np.float32(self.packing.unit)
        zeros, order = self.zeros(rows) if self.zeros else None, self.order() if self.order else None
        if zeros is not None and self.packing.bits == 4:  # so few bits that the difference fits into int8
            _apply("sub_", numbers, zeros.astype(np.int8), self.scales.width, order)
            zeros = None
        values = numbers if numbers.dtype == np.float32 else np.empty(numbers.shape, np.float32)
        step = max(1, TILE // max(1, numbers.shape[1]))
        for start in range(0, len(numbers), step):
            tile = slice(start, start + step)
            if values is not numbers:
                values[tile] = numbers[tile]
            if zeros is not None:
                _apply("sub_", values[tile], zeros[tile], self.scales.width, order)
            _apply("mul_", values[tile], scales[tile], self.scales.width, order)
        if self.column_scale is not None:
            values *= self.column_scale()
        return values

    def integers(self, rows: slice) -> SourceIntegers | None:
        if self.integer_group is None or (self.order and self.order() is not None):
            return None
        numbers = self._numbers(rows)
        if self.zeros is not None:
            group_of_column = np.arange(numbers.shape[1]) // self.scales.width
            shifted = numbers.astype(np.int16) - self.zeros(rows).astype(np.int16)[:, group_of_column]
            if shifted.size and not (int(shifted.min()) >= -128 and int(shifted.max()) <= 127):
                return None
            numbers = shifted.astype(np.int8)
        return SourceIntegers(numbers, self.scales.read(rows) * np.float32(self.packing.unit), self.scales.width)

    @property
    def integer_group(self) -> int | None:
        return self.scales.width if self.packing.whole_numbers and self.column_scale is None else None

    def _numbers(self, rows: slice) -> np.ndarray:
        return self.packing.numbers(self.packed, self.parts[self.packed], rows, self.matrix_shape)


def _apply(operation: str, values: np.ndarray, by_group: np.ndarray, width: int, order: np.ndarray | None) -> None:
    """``values [rows, columns]`` in place, each with what its group of ``by_group [rows, groups]`` has.

    By torch: numpy's loops over so few columns are 3 times slower.
    """
    import torch

    columns = values.shape[1]
    tensor, other = torch.from_numpy(values), torch.from_numpy(by_group)
    if order is not None:
        getattr(tensor, operation)(other.index_select(1, torch.from_numpy(order)))
        return
    whole = columns // width
    if whole:
        getattr(tensor[:, : whole * width].unflatten(1, (whole, width)), operation)(other[:, :whole, None])
    if columns % width:
        getattr(tensor[:, whole * width :], operation)(other[:, whole:])
