"""Weights in the layout of the native lowering: panels of 16 rows, as drawn in plugins/onnxruntime/README.md.

A panel holds 16 neighbouring rows of a matrix. If the rows are a gate and an up projection, panels of the two halves alternate:
panel 0 holds the gate's rows 0-15, panel 1 those of the up projection, panel 2 the gate's rows 16-31, and so on. Each half is
padded with zeros to a multiple of 16 rows.
"""

from functools import reduce

import numpy as np

from rq_compile.quantization.formats import PACKED_FORMATS, Format
from rq_compile.quantization.packing import Quantized, unpacked

ROWS = 16


def panel_count(rows: int, halves: int) -> int:
    """Number of panels of a matrix with ``rows`` rows, which are ``halves`` projections (2 for gate and up, otherwise 1)."""
    return halves * -(-(rows // halves) // ROWS)


def float_panels(weights: np.ndarray, halves: int) -> np.ndarray:
    """``[panels, columns, 16]`` from ``weights [rows, columns]``, with the same dtype."""
    return np.ascontiguousarray(_panels(weights, halves))


def packed_panels(quantized: Quantized, format: Format, halves: int) -> np.ndarray:
    """uint8 ``[panels, words, 64]``: of each row, four neighbouring bytes in each word.

    int8: a byte is a column. Below, the lowest bits of a word's four bytes are four columns, the bits above them the next four.
    int3: see ``_words_of_3_bits``.
    """
    bits, columns = PACKED_FORMATS[format].bits, quantized.packed
    if bits == 3:
        columns = _words_of_3_bits(unpacked(columns, bits).reshape(*quantized.scales.shape, -1))
    elif bits < 8:
        # As packed, int4 has a byte for two neighbours: eight columns a b c d e f g h are wanted as ea fb gc hd.
        fours = unpacked(columns, bits).view("<u4").reshape(len(columns), -1, 8 // bits)
        columns = reduce(np.bitwise_or, [fours[..., place] << place * bits for place in range(8 // bits)])
    return np.ascontiguousarray(_panels(np.ascontiguousarray(columns).view("<u4"), halves)).view(np.uint8)


def _words_of_3_bits(codes: np.ndarray) -> np.ndarray:
    """uint8 ``[rows, bytes]`` from ``codes [rows, blocks, block]``: three words for 32 columns. If 16 are left at the end of a
    block, they take the first two.

    Of the eight times four columns, words 0, 1 and 2 hold two times four in their lowest six bits. The bits 6 and 7 of word 0 are
    the lower bits of the seventh four columns, those of word 2 those of the eighth; those of word 1 are the upper bits of both.
    """
    rows, blocks, block = codes.shape
    filled = np.pad(codes, ((0, 0), (0, 0), (0, -block % 32))).reshape(rows, blocks, -1, 8, 4)
    fours = [filled[..., four, :] for four in range(8)]
    words = [fours[2 * word] | fours[2 * word + 1] << 3 for word in range(3)]
    words[0] |= (fours[6] & 3) << 6
    words[1] |= fours[6] >> 2 << 6 | fours[7] >> 2 << 7
    words[2] |= (fours[7] & 3) << 6
    needed = PACKED_FORMATS["int3"].words(block)
    return np.stack(words, axis=-2).reshape(rows, blocks, -1, 4)[:, :, :needed].reshape(rows, -1)


def scale_panels(quantized: Quantized, halves: int) -> np.ndarray:
    """The scales by panel, ``[panels, blocks, 16]``."""
    return float_panels(quantized.scales, halves)


def _panels(rows: np.ndarray, halves: int) -> np.ndarray:
    """``[panels, columns, 16]`` from ``rows [rows, columns]``."""
    count, columns = len(rows) // halves, rows.shape[1]
    filled = rows.reshape(halves, count, columns)
    if count % ROWS:
        filled = np.pad(filled, ((0, 0), (0, -count % ROWS), (0, 0)))
    return filled.reshape(halves, -1, ROWS, columns).transpose(1, 0, 3, 2).reshape(-1, columns, ROWS)
