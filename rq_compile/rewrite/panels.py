"""Weights in the layout of the native lowering: panels of 16 rows, as drawn in plugins/onnxruntime/README.md.

A panel holds 16 neighbouring rows of a matrix. If the rows are a gate and an up projection, panels of the two halves alternate:
panel 0 holds the gate's rows 0-15, panel 1 those of the up projection, panel 2 the gate's rows 16-31, and so on. Each half is
padded with zeros to a multiple of 16 rows.
"""

import numpy as np

from rq_compile.quantization.formats import PACKED_FORMATS, Format
from rq_compile.quantization.packing import Quantized, unpacked

ROWS = 16


def panel_count(rows: int, halves: int) -> int:
    """Number of panels of a matrix with ``rows`` rows, which are ``halves`` projections (2 for gate and up, otherwise 1)."""
    return halves * -(-(rows // halves) // ROWS)


def float_panels(weights: np.ndarray, halves: int) -> np.ndarray:
    """``[panels, columns, 16]`` from ``weights [rows, columns]``, with the same dtype."""
    return np.ascontiguousarray(_panels(weights, halves).transpose(0, 2, 1))


def packed_panels(quantized: Quantized, format: Format, halves: int) -> np.ndarray:
    """uint8 ``[panels, groups, 64]``: of each row, four neighbouring bytes in each group.

    int8: a byte is a column. Below, the lowest bits of a group's four bytes are four columns, the bits above them the next four.
    """
    bits, columns = PACKED_FORMATS[format].bits, quantized.packed
    if bits < 8:
        # As packed, int4 has a byte for two neighbours: eight columns a b c d e f g h are wanted as ea fb gc hd.
        parts = unpacked(columns, bits).reshape(len(columns), -1, 8 // bits, 4)
        columns = np.bitwise_or.reduce([parts[:, :, place] << place * bits for place in range(8 // bits)])
        columns = columns.reshape(len(columns), -1)
    panels = _panels(columns, halves)
    groups = panels.reshape(len(panels), ROWS, -1, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(groups).reshape(len(panels), -1, 4 * ROWS)


def scale_panels(quantized: Quantized, halves: int) -> np.ndarray:
    """The scales by panel, ``[panels, blocks, 16]``."""
    return float_panels(quantized.scales, halves)


def _panels(rows: np.ndarray, halves: int) -> np.ndarray:
    """The rows by panel, ``[panels, 16, columns]``."""
    count, columns = len(rows) // halves, rows.shape[1]
    filled = np.pad(rows.reshape(halves, count, columns), ((0, 0), (0, -count % ROWS), (0, 0)))
    return filled.reshape(halves, -1, ROWS, columns).swapaxes(0, 1).reshape(-1, ROWS, columns)
