"""The formats a slot may have, their block size and their bytes. Pure arithmetic; nothing here needs numpy."""

from typing import Literal, get_args

Format = Literal["fp32", "fp16", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
Quantizer = Literal["gptq", "nearest"]
# Of non-expert matrices in a native engine: 16 bit as stored, rounded to int8, or widened to fp32.
DenseFormat = Literal["stored", "int8", "fp32"]
FLOAT_FORMATS: tuple[Format, ...] = ("fp32", "fp16", "bf16")
QUANTIZED_FORMATS: tuple[Format, ...] = ("int8", "int4")
BITS: dict[Format, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
# The least and the greatest q of a quantized weight q * scale.
WHOLE_NUMBERS: dict[Format, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
SCALE_BYTES = 4
BLOCK_SIZES = (128, 64, 32, 16)
# The most weights that share one scale: with fewer, what is stored is nearer to the weights and takes more bytes.
Block = Literal[128, 64, 32, 16]
BLOCKS: tuple[Block, ...] = get_args(Block)


def block_size(columns: int, most: Block = 128) -> int:
    """Weights that share one scale in a row of ``columns``: the largest of 128, 64, 32, 16 up to ``most`` that divides it.

    Where none does, 16, and the last block is padded with zeros.
    """
    return next((block for block in BLOCK_SIZES if block <= most and columns % block == 0), BLOCK_SIZES[-1])


def matrix_bytes(format: Format, rows: int, columns: int, most: Block = 128) -> int:
    """Bytes of one ``[rows, columns]`` matrix in ``format``, scales and padding included; ``most``: see ``block_size``."""
    if format in FLOAT_FORMATS:
        return rows * columns * BITS[format] // 8
    block = block_size(columns, most)
    blocks = -(-columns // block)
    return rows * blocks * (block * BITS[format] // 8 + SCALE_BYTES)
