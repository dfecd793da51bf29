"""A quantized weight: packed codes, scales and, in some formats, zero points and an order of the columns."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rq_compile.checkpoint.safetensors_file import DTYPES, not_finite
from rq_compile.checkpoint.storage.decoding import Codes, Groups, differences, read_codes, scaled
from rq_compile.checkpoint.storage.packings import E2M1_PAIRS, E4M3, Packing
from rq_compile.checkpoint.storage.scales import Scales
from rq_compile.checkpoint.storage.weight import BF16, Weight
from rq_compile.quantization.formats import Format
from rq_compile.quantization.source_numbers import SourceNumbers


@dataclass(frozen=True, kw_only=True)
class Quantized(Weight):
    """``(number - zero) * scale``, times ``column_scale`` if a quantizer has moved scales of the inputs into the weights.

    ``packed``: the part that holds the codes. ``zeros(rows)``: ``[rows, groups]``, or one per row. ``order()``: the group of
    each column, int64 ``[columns]``, or None if groups are consecutive. ``column_scale()``: fp32 ``[columns]``.
    """

    packed: str
    packing: Packing
    scales: Scales
    zeros: Callable[[slice], np.ndarray] | None = None
    order: Callable[[], np.ndarray | None] | None = None
    column_scale: Callable[[], np.ndarray] | None = None

    @property
    def dtype(self) -> np.dtype:
        """bf16 if codes with few bits are multiplied by powers of two, which is exact."""
        plain = self.zeros is None and self.column_scale is None
        return BF16 if plain and self.packing.bits <= 8 and self.scales.powers_of_two else np.dtype(np.float32)

    def decode(self, rows: slice) -> np.ndarray:
        order = self.order() if self.order else None
        values = scaled(self._codes(rows), self._groups(rows, order))
        if values is None:
            raise not_finite(self.packed, self.parts[self.packed])
        if self.column_scale is not None:
            values *= self.column_scale()
        return values

    def source_numbers(self, rows: slice) -> SourceNumbers | None:
        if self.source_group is None or (self.order and self.order() is not None):
            return None
        groups = self._groups(rows)
        if self.packing is E4M3:
            codes = self._codes(rows).words.view(np.uint8)
            if (codes & 0x7F == 0x7F).any():
                raise not_finite(self.packed, self.parts[self.packed])
            return SourceNumbers(codes.view(DTYPES["F8_E4M3"]), groups.scales, groups.width)
        numbers = differences(self._codes(rows), groups)
        return None if numbers is None else SourceNumbers(numbers, groups.scales, groups.width)

    @property
    def source_group(self) -> int | None:
        carried = self.packing.whole_numbers or self.packing is E4M3
        return self.scales.width if carried and self.column_scale is None else None

    @property
    def slot_format(self) -> Format | None:
        if self.zeros is not None or self.column_scale is not None:
            return None
        if self.packing is E4M3:
            return "fp8"
        return "mxfp4" if self.packing is E2M1_PAIRS and self.scales.powers_of_two else None

    def _codes(self, rows: slice) -> Codes:
        return read_codes(self.packing, self.packed, self.parts[self.packed], rows, self.matrix_shape)

    def _groups(self, rows: slice, order: np.ndarray | None = None) -> Groups:
        scales = self.scales.read(rows) * np.float32(self.packing.unit)
        return Groups(self.scales.width, scales, self.zeros(rows) if self.zeros else None, order)
