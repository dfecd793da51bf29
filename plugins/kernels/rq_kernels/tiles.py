"""Tiles of the products, and the choice of tiles for a batch. This module does not need Triton.

A row tile of a slot reads the slot's weights once and multiplies them by all rows of the tile, including unused ones. Small tiles
therefore read the weights of busy slots repeatedly, and large tiles compute unused rows. If slot s has ``rows[s]`` rows, tiles of
M rows take, in units of the time for the products of one row on the tensor cores,

    sum over s with rows of  READ + ceil(rows[s] / M) * max(M, REREAD)

READ is the time to read a strip of weights from memory. This happens once for any number of tiles, because the tiles of a slot
are neighbours in the grid. REREAD is the time to read it from the second-level cache, for which the tensor cores wait. READ
depends on the format, but this does not affect the choice, because it is the same for every M.

The rule needs only the expected rows, not a batch. It is applied when an engine is built, for each optimization profile, and the
choice is an attribute of the layer. Any choice gives the right result.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

CHUNK = 128  # pairs of a program of dispatch_count and dispatch_scatter
SMALL = 1024  # dispatch_small is used for up to this many pairs
COMBINE_COLUMNS = 512
# An SM of an H100 does 2048 fp16 multiply-adds per cycle and reads at most about 40 bytes per cycle from the second-level cache.
# A weight of two bytes therefore takes as long as the products of 100 rows. A weight of a byte or less is read faster, but
# unpacking takes four instructions at 128 per cycle. These are published figures; the choice has yet to be measured.
REREAD = 100


@dataclass(frozen=True)
class Tile:
    """The part that one program of the products computes: ``rows`` by ``outputs``, with ``columns`` float weights at a time."""

    rows: int
    outputs: int
    columns: int
    warps: int
    stages: int

    def step(self, block: int) -> int:
        """The number of quantized weights of a row at a time, if ``block`` of them share a scale."""
        return min(self.columns, block)


# The name says what the tiles are for. With a gated activation, ``up`` holds two sums for each output.
UP = {
    "decode": Tile(rows=16, outputs=64, columns=128, warps=4, stages=3),
    "batch": Tile(rows=64, outputs=64, columns=64, warps=4, stages=3),
    "prefill": Tile(rows=128, outputs=64, columns=64, warps=8, stages=3),
}
DOWN = {
    "decode": Tile(rows=16, outputs=64, columns=128, warps=4, stages=4),
    "batch": Tile(rows=64, outputs=128, columns=64, warps=4, stages=3),
    "prefill": Tile(rows=128, outputs=128, columns=64, warps=8, stages=3),
}
# Those of layers with slots in int3 or int2, so that fewer kernels are built.
FEW_BITS = ("decode", "batch")
# The tensor cores of SM 100 take 128 outputs only together with at least 64 columns at a time.
NARROW = 64


def fitted(tile: Tile, block: int, *, few_bits: bool = False) -> Tile:
    """``tile`` for weights in blocks of ``block`` columns.

    ``few_bits``: for layers with slots in int3 or int2. Their steps of 64 columns divide blocks of 64 and of 128, and they load
    as many columns ahead as others.
    """
    if few_bits:
        tile = replace(tile, columns=NARROW, stages=1 + (tile.stages - 1) * tile.columns // NARROW)
    return replace(tile, outputs=min(tile.outputs, NARROW)) if tile.step(block) < NARROW else tile


def rule() -> dict[str, Any]:
    """What a launcher has to know of this module, for kernels.json."""
    return {"rows": {name: tile.rows for name, tile in UP.items()}, "few_bits": FEW_BITS, "reread": REREAD, "small": SMALL}


def tile_count(rows: Sequence[float], rows_per_tile: int) -> int:
    """Row tiles of slots with ``rows[s]`` expected rows each, rounded up to whole rows."""
    return sum(-(-_whole(n) // rows_per_tile) for n in rows)


def cost(rows: Sequence[float], rows_per_tile: int) -> float:
    """The time of the products without the part that is equal for all tile sizes, in products of a row by one strip of
    weights."""
    return tile_count(rows, rows_per_tile) * max(rows_per_tile, REREAD)


def choose(rows: Sequence[float], sizes: Iterable[str] = tuple(UP)) -> str:
    """The name of the best tiles for slots with ``rows[s]`` expected rows each; the smallest among equally good ones."""
    return min(sizes, key=lambda name: (cost(rows, UP[name].rows), UP[name].rows))


def expected_rows(shares: Sequence[float], pairs: int) -> list[float]:
    """Rows of each slot in a batch of ``pairs`` (token, choice) pairs, from the slots' calibrated ``shares`` of all pairs."""
    return [share * pairs for share in shares]


def most_tiles(pairs: int, slots: int, rows_per_tile: int) -> int:
    """Number of row tiles of the worst batch, in which as many slots as possible hold one row too many. It is the size of the
    products' grid and of ``tiles``."""
    touched = min(pairs, slots)
    return (pairs - touched) // rows_per_tile + touched


def _whole(rows: float) -> int:
    return -int(-rows // 1)
