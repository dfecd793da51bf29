"""Bytes of non-expert matrices in an engine's weights file."""

from rq_compile.quantization.formats import SCALE_BYTES, SLOT_FORMATS, Format, block_size

# Each tensor begins at a page, so that it can be mapped into memory separately.
PAGE = 4096


def paged(size: int) -> int:
    """``size`` bytes, filled up to whole pages."""
    return size + -size % PAGE


def quantized_parts(rows: int, columns: int, format: Format) -> tuple[int, int]:
    """Bytes of the packed numbers and of the scales of ``[rows, columns]``; the last block of a row is filled up."""
    blocks = -(-columns // (block := block_size(columns)))
    return rows * blocks * block * SLOT_FORMATS[format].bits // 8, rows * blocks * SCALE_BYTES


def quantized_bytes(rows: int, columns: int, format: Format) -> int:
    return sum(map(paged, quantized_parts(rows, columns, format)))


def float_bytes(rows: int, columns: int, bits: int) -> int:
    return paged(rows * columns * bits // 8)
