"""Weights that a checkpoint stores as integers with scales, copied into a slot instead of rounded again."""

from dataclasses import dataclass

import numpy as np

from rq_compile.quantization.formats import BLOCK_FORMATS, Block, Format, block_size


@dataclass(frozen=True)
class SourceIntegers:
    """``numbers`` int8 ``[rows, columns]``; ``scales`` fp32 ``[rows, ceil(columns / group)]``, each for ``group`` columns."""

    numbers: np.ndarray
    scales: np.ndarray
    group: int

    def in_blocks(self, format: Format, most: Block) -> tuple[np.ndarray, np.ndarray] | None:
        """The numbers, with the last block of a row padded with zeros, and a scale for each block of a slot in ``format``.

        ``most``: see ``block_size``. None if the slot cannot hold them, because a number is out of range or a block would need
        more than one scale.
        """
        columns = self.numbers.shape[1]
        block = block_size(columns, most)
        if format not in BLOCK_FORMATS or (self.group % block and self.group < columns):
            return None
        least, greatest = BLOCK_FORMATS[format].held
        if self.numbers.size and not (least <= int(self.numbers.min()) and int(self.numbers.max()) <= greatest):
            return None
        blocks = -(-columns // block)
        numbers = np.pad(self.numbers, ((0, 0), (0, blocks * block - columns))) if columns % block else self.numbers
        group_of_block = np.arange(blocks) * block // self.group
        return numbers.reshape(len(numbers), blocks, block), np.ascontiguousarray(self.scales[:, group_of_block])
