"""The formats of slots: one object each, which all stages use. Pure arithmetic, without numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

if TYPE_CHECKING:
    import numpy as np

Format = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Quantizer = Literal["gptq", "nearest"]
# Formats of non-expert matrices in a native engine: 16 bits as stored, rounded to int8 or int4, or widened to fp32.
DenseFormat = Literal["stored", "int8", "int4", "fp32"]
SCALE_BYTES = 4
BLOCK_SIZES = (128, 64, 32, 16)
# The maximum number of weights that share one scale. Fewer reduce the rounding error and take more bytes.
Block = Literal[128, 64, 32, 16]
BLOCKS: tuple[Block, ...] = get_args(Block)


@dataclass(frozen=True)
class SlotFormat:
    """How a slot stores its weights: with ``bits`` bits each, in tensors of type ``element`` (as named by numpy, ml_dtypes and
    ONNX). Slots of one ``group`` are read from the same inputs of an op of ``rq.moe``."""

    name: Format
    bits: int
    element: str
    group: str

    quantized: ClassVar[bool] = False

    @property
    def dtype(self) -> np.dtype:
        import ml_dtypes  # noqa: F401 - gives numpy bfloat16 and int4
        import numpy as np

        return np.dtype(self.element)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The inputs of an op that hold the weights of the group, by the suffix of their names."""
        return (f"{self.group}_weights",)

    def matrix_bytes(self, rows: int, columns: int, most: Block = 128) -> int:
        """Bytes of one ``[rows, columns]`` matrix, including scales and padding. ``most``: see ``block_size``."""
        return rows * columns * self.bits // 8


@dataclass(frozen=True)
class BlockFormat(SlotFormat):
    """Block-wise and symmetric: ``block_size`` neighbours of a row share one fp32 scale, and a weight is ``q * scale``.

    Rounding uses the integers q from ``least`` to ``greatest``. GPTQ tries ``fractions`` scales, from the one that just holds a
    block's largest weight down to ``smallest`` times that scale, because clipping helps if there are few levels.
    """

    least: int
    greatest: int
    fractions: int
    smallest: float

    quantized: ClassVar[bool] = True

    @property
    def held(self) -> tuple[int, int]:
        """The least and the greatest q that a slot can hold. The range may be larger than the one that rounding uses."""
        return -self.zero_point, self.zero_point - 1

    @property
    def zero_point(self) -> int:
        """The number that is added to q before it is packed, as in ONNX Runtime's ``MatMulNBits``."""
        return 1 << (self.bits - 1)

    @property
    def signed_scales(self) -> bool:
        """Whether the negative side has one more value. The sign of a scale then puts the largest weight on this side."""
        return -self.least > self.greatest

    @property
    def tensors(self) -> tuple[str, ...]:
        return f"{self.group}_packed", f"{self.group}_scales"

    def matrix_bytes(self, rows: int, columns: int, most: Block = 128) -> int:
        block = block_size(columns, most)
        return rows * -(-columns // block) * (block * self.bits // 8 + SCALE_BYTES)


INT8 = BlockFormat("int8", 8, "int8", "int8", least=-127, greatest=127, fractions=5, smallest=0.9)
INT4 = BlockFormat("int4", 4, "int4", "int4", least=-8, greatest=7, fractions=17, smallest=0.6)
# The most exact format first. Plans, tables and lanes list formats in this order.
SLOT_FORMATS: dict[Format, SlotFormat] = {
    format.name: format
    for format in (
        SlotFormat("fp32", 32, "float32", "float"),
        SlotFormat("fp16", 16, "float16", "float"),
        SlotFormat("bf16", 16, "bfloat16", "float"),
        INT8,
        INT4,
    )
}
BLOCK_FORMATS: dict[Format, BlockFormat] = {name: kept for name, kept in SLOT_FORMATS.items() if isinstance(kept, BlockFormat)}
FORMATS = tuple(SLOT_FORMATS)
FLOAT_FORMATS = tuple(name for name, format in SLOT_FORMATS.items() if not format.quantized)
QUANTIZED_FORMATS = tuple(BLOCK_FORMATS)


def tensors_of(group: str) -> tuple[str, ...]:
    """``SlotFormat.tensors`` for the formats of ``group``."""
    return next(format.tensors for format in SLOT_FORMATS.values() if format.group == group)


def block_size(columns: int, most: Block = 128) -> int:
    """Number of weights that share one scale in a row of ``columns``: the largest of 128, 64, 32, 16 that divides ``columns`` and
    is at most ``most``. If there is none, the size is 16, and the last block is padded with zeros.
    """
    return next((block for block in BLOCK_SIZES if block <= most and columns % block == 0), BLOCK_SIZES[-1])


def matrix_bytes(format: Format, rows: int, columns: int, most: Block = 128) -> int:
    """``SlotFormat.matrix_bytes`` of the format of this name."""
    return SLOT_FORMATS[format].matrix_bytes(rows, columns, most)
