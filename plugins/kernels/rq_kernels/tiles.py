"""Tiles of the products, and which ones a batch is given. Nothing here needs Triton.

A row tile of a slot reads the slot's weights once and multiplies them with all rows of the tile, the missing ones included. So
small tiles read the weights of busy slots again and again, and large tiles compute rows that nobody asked for. With ``rows[s]``
of slot s, tiles of M rows take, in units of the time that one row's products take on the tensor cores,

    sum over s with rows of  READ + ceil(rows[s] / M) * max(M, REREAD)

READ is the time to bring a strip of weights from memory, which happens once however many tiles use it (the tiles of a slot are
neighbours in the grid), REREAD the time to bring it from the second-level cache, behind which the tensor cores wait. It does not
matter for the choice that READ depends on the format: every M pays it alike.

The rule needs expected rows only, no batch: it is applied when an engine is built, per optimization profile, and the choice is an
attribute of the layer. Any choice gives the right answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CHUNK = 128  # pairs of a program of dispatch_count and dispatch_scatter
SMALL = 1024  # up to so many pairs dispatch_small is used
COMBINE_COLUMNS = 512
# An SM of an H100 multiplies and adds 2048 pairs of fp16 a cycle and reads at best some 40 bytes a cycle from the second-level
# cache: a weight of two bytes takes as long as the products of 100 rows. One of a byte or less is read faster, but unpacking it
# takes four instructions of 128 a cycle. Published figures; the choice is yet to be measured.
REREAD = 100


@dataclass(frozen=True)
class Tile:
    """What one program of the products computes: ``rows`` by ``outputs``, float weights ``columns`` at a time."""

    rows: int
    outputs: int
    columns: int
    warps: int
    stages: int


# The name says what it is for; ``up`` holds two sums for each output where the activation is gated.
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


def tile_count(rows: Sequence[float], rows_per_tile: int) -> int:
    """Row tiles of slots with ``rows[s]`` expected rows each, rounded up to whole rows."""
    return sum(-(-_whole(n) // rows_per_tile) for n in rows)


def cost(rows: Sequence[float], rows_per_tile: int) -> float:
    """The time of the products, but for what every tile size pays alike; in products of a row with one strip of weights."""
    return tile_count(rows, rows_per_tile) * max(rows_per_tile, REREAD)


def choose(rows: Sequence[float]) -> str:
    """The name of the tiles for slots with ``rows[s]`` expected rows each; of equally good ones the smallest."""
    return min(UP, key=lambda name: (cost(rows, UP[name].rows), UP[name].rows))


def expected_rows(shares: Sequence[float], pairs: int) -> list[float]:
    """Rows of each slot in a batch of ``pairs`` (token, choice) pairs, from the slots' calibrated ``shares`` of all pairs."""
    return [share * pairs for share in shares]


def most_tiles(pairs: int, slots: int, rows_per_tile: int) -> int:
    """Row tiles of the worst batch: as many slots as possible hold one row too many. The grid of the products, and ``tiles``."""
    touched = min(pairs, slots)
    return (pairs - touched) // rows_per_tile + touched


def _whole(rows: float) -> int:
    return -int(-rows // 1)
