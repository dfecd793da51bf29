"""The formats of slots: one object each, which all stages use. Pure arithmetic, without numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

if TYPE_CHECKING:
    import numpy as np

Format = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4", "mxfp4", "int3", "int2", "constant"]
Quantizer = Literal["gptq", "nearest"]
# Formats of non-expert matrices in a native engine: 16 bits as stored, rounded to int8 or int4, or widened to fp32.
DenseFormat = Literal["stored", "int8", "int4", "fp32"]
# Formats that a plan gives non-expert matrices: those of the checkpoint, as the lowering holds them, or rounded ones.
PlannedDense = Literal["stored", "int8", "int4"]
DENSE_QUANTIZED: tuple[Format, ...] = ("int8", "int4")
SCALE_BYTES = 4
WORD_BYTES = 4
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
    # Whether the format only holds weights that the checkpoint stores in the same way. Nothing is rounded to it.
    only_carried: ClassVar[bool] = False
    # Whether a slot computes its expert's output from its inputs.
    computed: ClassVar[bool] = True

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

    def expert_bytes(self, hidden: int, intermediate: int, up_rows: int, bias: int, most: Block = 128) -> int:
        """Bytes of a slot: an up matrix ``[up_rows, hidden]``, a down matrix ``[hidden, intermediate]``, and ``bias`` bytes of
        biases."""
        return self.matrix_bytes(up_rows, hidden, most) + self.matrix_bytes(hidden, intermediate, most) + bias


@dataclass(frozen=True)
class PackedFormat(SlotFormat):
    """Block-wise: ``block_size`` neighbours of a row share a scale, and a weight is ``q * scale`` with a number q.

    Codes of ``bits`` bits stand for the numbers ``numbers``, which are whole except in fp8. A scale is stored in fp32 or, if
    ``exponents`` is set, as a byte e that stands for ``unit * 2^(e - 127)``.
    """

    quantized: ClassVar[bool] = True
    exponents: ClassVar[bool] = False

    @property
    def numbers(self) -> tuple[float, ...]:
        """The number q of each code."""
        raise NotImplementedError

    @property
    def scale_bytes(self) -> int:
        return 1 if self.exponents else SCALE_BYTES

    @property
    def tensors(self) -> tuple[str, ...]:
        return f"{self.group}_packed", f"{self.group}_scales"

    def matrix_bytes(self, rows: int, columns: int, most: Block = 128) -> int:
        block = block_size(columns, most)
        return rows * -(-columns // block) * (WORD_BYTES * self.words(block) + self.scale_bytes)

    def words(self, block: int) -> int:
        """The words of ``WORD_BYTES`` that hold ``block`` weights of a row. Only 3 bits in blocks of 16 do not fill them."""
        return -(-block * self.bits // (8 * WORD_BYTES))


@dataclass(frozen=True)
class BlockFormat(PackedFormat):
    """Integers that follow each other, symmetric around 0, with fp32 scales.

    Rounding uses the integers q from ``least`` to ``greatest``. GPTQ tries ``fractions`` scales, from the one that just holds a
    block's largest weight down to ``smallest`` times that scale, because clipping helps if there are few levels.
    """

    least: int
    greatest: int
    fractions: int
    smallest: float

    @property
    def numbers(self) -> tuple[int, ...]:
        """All that a slot can hold. The range may be larger than the one that rounding uses."""
        return tuple(range(-self.zero_point, self.zero_point))

    @property
    def zero_point(self) -> int:
        """The number that is added to q before it is packed, as in ONNX Runtime's ``MatMulNBits``."""
        return 1 << (self.bits - 1)

    @property
    def signed_scales(self) -> bool:
        """Whether the negative side has one more value. The sign of a scale then puts the largest weight on this side."""
        return -self.least > self.greatest


@dataclass(frozen=True)
class MxFormat(PackedFormat):
    """MXFP4 of the OCP Microscaling Formats (MX) Specification 1.0: float4_e2m1 with scales that are powers of two.

    ``numbers`` are the floats divided by ``unit``, which are whole numbers. Published checkpoints have blocks of 32.
    """

    unit: float

    exponents: ClassVar[bool] = True
    only_carried: ClassVar[bool] = True

    @property
    def numbers(self) -> tuple[int, ...]:
        magnitudes = (0, 1, 2, 3, 4, 6, 8, 12)
        return (*magnitudes, *(-number for number in magnitudes))


INT8 = BlockFormat("int8", 8, "int8", "int8", least=-127, greatest=127, fractions=5, smallest=0.9)
INT4 = BlockFormat("int4", 4, "int4", "int4", least=-8, greatest=7, fractions=17, smallest=0.6)
# ONNX has no type for 3 bits; standard ops read both in tensors of int4.
INT3 = BlockFormat("int3", 3, "int4", "int3", least=-4, greatest=3, fractions=17, smallest=0.5)
INT2 = BlockFormat("int2", 2, "int4", "int2", least=-2, greatest=1, fractions=17, smallest=0.3)


@dataclass(frozen=True)
class Fp8Format(PackedFormat):
    """float8_e4m3fn (OCP 8-bit Floating Point Specification 1.0) with fp32 scales, such as those of published FP8 checkpoints."""

    only_carried: ClassVar[bool] = True

    @property
    def numbers(self) -> tuple[float, ...]:
        exponents, mantissas = range(16), range(8)
        magnitudes = [2.0 ** (max(e, 1) - 10) * ((8 if e else 0) + m) for e in exponents for m in mantissas]
        magnitudes[-1] = float("nan")
        return (*magnitudes, *(-number for number in magnitudes))


@dataclass(frozen=True)
class ConstantFormat(SlotFormat):
    """A slot without weights: one fp32 vector ``[hidden]`` replaces the expert's output for every token. The gate stays."""

    quantized: ClassVar[bool] = True
    computed: ClassVar[bool] = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("outputs",)

    def expert_bytes(self, hidden: int, intermediate: int, up_rows: int, bias: int, most: Block = 128) -> int:
        return 4 * hidden


FP8 = Fp8Format("fp8", 8, "float8_e4m3fn", "fp8")
CONSTANT = ConstantFormat("constant", 0, "float32", "constant")
MXFP4 = MxFormat("mxfp4", 4, "float4_e2m1fn", "mxfp4", unit=0.5)
# The most exact format first, for weights that are not stored in one of them. Plans, tables and lanes list formats in this order.
SLOT_FORMATS: dict[Format, SlotFormat] = {
    format.name: format
    for format in (
        SlotFormat("fp32", 32, "float32", "float"),
        SlotFormat("fp16", 16, "float16", "float"),
        SlotFormat("bf16", 16, "bfloat16", "float"),
        INT8,
        FP8,
        INT4,
        MXFP4,
        INT3,
        INT2,
        CONSTANT,
    )
}
PACKED_FORMATS: dict[Format, PackedFormat] = {name: kept for name, kept in SLOT_FORMATS.items() if isinstance(kept, PackedFormat)}
# Those that weights are rounded to, and those of them that a calibration measures unless it is asked for more.
BLOCK_FORMATS: dict[Format, BlockFormat] = {name: kept for name, kept in SLOT_FORMATS.items() if isinstance(kept, BlockFormat)}
MEASURED_FORMATS: tuple[Format, ...] = ("int8", "int4")
# Those that only some engines store in their own bits, the others as int4.
FEW_BITS: tuple[Format, ...] = ("int3", "int2")
# Those that a calibration can be asked for.
MEASURABLE_FORMATS: tuple[Format, ...] = (*BLOCK_FORMATS, CONSTANT.name)
FORMATS = tuple(SLOT_FORMATS)
FLOAT_FORMATS = tuple(name for name, format in SLOT_FORMATS.items() if not format.quantized)
COMPUTED_FORMATS = tuple(name for name, format in SLOT_FORMATS.items() if format.computed)
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
