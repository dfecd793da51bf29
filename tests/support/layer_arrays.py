"""Inputs of a MoeLayer node, of the right types and shapes: zeros and ones. The path to its model is added here."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "plugins" / "cuda"))


def arrays_of(
    formats: list[int],
    tokens: int = 3,
    hidden: int = 64,
    intermediate: int = 32,
    experts: Any = 2,
    top_k: int = 2,
    block: int = 64,
    gated: bool = False,
    bias: bool = False,
    half: Any = np.float16,
) -> Any:
    """Every other expert has one slot; the first has the remaining ones."""
    slots = len(formats)
    replicas = np.full((experts, slots), -1, np.int32)
    replicas[0, : slots - experts + 1] = range(slots - experts + 1)
    replicas[1:, 0] = range(slots - experts + 1, slots)
    index = np.zeros(slots, np.int32)
    seen = dict.fromkeys(range(7), 0)
    for slot, format in enumerate(formats):
        index[slot], seen[format] = seen[format], seen[format] + 1
    arrays = [
        np.ones((tokens, hidden), half),
        np.tile(np.arange(top_k), (tokens, 1)).astype(np.int64),
        np.ones((tokens, top_k), np.float32),
        replicas,
        np.array(formats, np.int32),
    ]
    for outputs, columns in ((intermediate * (2 if gated else 1), hidden), (hidden, intermediate)):
        blocks = -(-columns // block)
        arrays.append(index)
        if seen[0]:
            arrays.append(np.zeros((seen[0], outputs, columns), half))
        for format, bits in ((1, 8), (2, 4), (5, 3), (6, 2)):
            if seen[format]:
                arrays.append(np.zeros((seen[format], outputs, blocks * block * bits // 8), np.int8))
                arrays.append(np.ones((seen[format], outputs, blocks), np.float32))
        if bias:
            arrays.append(np.zeros((slots, outputs), np.float32))
    return arrays
