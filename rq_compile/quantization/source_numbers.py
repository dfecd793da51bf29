"""Weights that a checkpoint stores as numbers of few bits with scales, copied into a slot instead of rounded again."""

from dataclasses import dataclass

import numpy as np

from rq_compile.quantization.formats import PACKED_FORMATS, Block, Format, Fp8Format, block_size
from rq_compile.quantization.packing import scale_values, storable_scales


@dataclass(frozen=True)
class SourceNumbers:
    """``numbers [rows, columns]``, int8 or, of FP8, float8_e4m3fn; ``scales`` fp32 ``[rows, ceil(columns / group)]``, each for
    ``group`` columns."""

    numbers: np.ndarray
    scales: np.ndarray
    group: int

    def in_blocks(self, format: Format, most: Block) -> tuple[np.ndarray, np.ndarray] | None:
        """The numbers, with the last block of a row padded with zeros, and a scale for each block of a slot in ``format``.

        ``most``: see ``block_size``. None if the slot cannot hold them, because the format does not have a number or a scale, or
        a block would need more than one scale.
        """
        columns = self.numbers.shape[1]
        block = block_size(columns, most)
        if format not in PACKED_FORMATS or (self.group % block and self.group < columns):
            return None
        if not self._are_of(format):
            return None
        blocks = -(-columns // block)
        numbers = np.pad(self.numbers, ((0, 0), (0, blocks * block - columns))) if columns % block else self.numbers
        group_of_block = np.arange(blocks) * block // self.group
        numbers, scales = numbers.reshape(len(numbers), blocks, block), np.ascontiguousarray(self.scales[:, group_of_block])
        if not (storable := storable_scales(scales, format)).all():
            if numbers[~storable].any():
                return None
            scales[~storable] = scale_values(np.array(127, np.uint8), format)  # of zeros, any scale will do
        return numbers, scales

    def _are_of(self, format: Format) -> bool:
        """Whether the format has all of the numbers."""
        kept = PACKED_FORMATS[format]
        if self.numbers.dtype != np.int8 or isinstance(kept, Fp8Format):
            return self.numbers.dtype == kept.dtype
        known = np.zeros(256, bool)
        known[np.array(kept.numbers, np.int64) % 256] = True
        return bool(known[self.numbers.view(np.uint8)].all())
