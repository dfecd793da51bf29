"""Dispatch: groups the (token, choice) pairs by slot, with a counting sort without atomics.

The j-th arrival of expert e, in the flat order of ``ids``, goes to the slot ``replicas[e][j mod r]`` of its r slots, as in the
CPU's op. Inside a slot, pairs stay in order, so one number places a pair: its arrival j is row ``j div r`` of its slot.

    count     one program per chunk of pairs: the number of pairs of each expert
    scan      one program: the arrivals before each chunk, the rows of each slot, the row tiles of the products
    scatter   one program per chunk: moves the pairs to their places

``dispatch_small`` does all three in one program, because for a few hundred pairs two more launches cost more than the work.
"""

import triton
import triton.language as tl

from rq_kernels import tiles as host

CHUNK = tl.constexpr(host.CHUNK)
EXPERTS = tl.constexpr(64)
CHUNKS = tl.constexpr(32)
SLOTS = tl.constexpr(256)


@triton.jit
def _count(chunk, ids, counts, pairs, experts):
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    id = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
    for first in range(0, experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        here = (id[:, None] == expert[None, :]).to(tl.int32)
        tl.store(counts + chunk * experts + expert, tl.sum(here, axis=0), mask=expert < experts)


@triton.jit
def _copies(replicas, expert, mask, width):
    """The number of slots of each ``expert``: the entries in its row of ``replicas`` that are not -1."""
    copies = tl.zeros_like(expert)
    for copy in range(width):
        copies += (tl.load(replicas + expert * width + copy, mask=mask, other=-1) >= 0).to(tl.int32)
    return copies


@triton.jit
def _scan(counts, replicas, offsets, tiles, tile_count, chunks, experts, width, slots, rows_per_tile):
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        tl.store(offsets + slot, tl.zeros_like(slot), mask=slot < slots)
    tl.debug_barrier()
    for first in range(0, experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        known = expert < experts
        arrivals = tl.zeros([EXPERTS], tl.int32)
        for first_chunk in range(0, chunks, CHUNKS):
            chunk = first_chunk + tl.arange(0, CHUNKS)
            at = counts + chunk[:, None] * experts + expert[None, :]
            mask = (chunk < chunks)[:, None] & known[None, :]
            count = tl.load(at, mask=mask, other=0)
            tl.store(at, arrivals[None, :] + tl.cumsum(count, axis=0) - count, mask=mask)
            arrivals += tl.sum(count, axis=0)
        copies = _copies(replicas, expert, known, width)
        for copy in range(width):
            slot = tl.load(replicas + expert * width + copy, mask=known, other=-1)
            # The slot gets the arrivals copy, copy + copies, copy + 2 * copies, ...
            rows = (arrivals - copy + copies - 1) // tl.maximum(copies, 1)
            tl.store(offsets + slot, rows, mask=(slot >= 0) & (slot < slots))
    tl.debug_barrier()
    rows_before = 0
    tiles_before = 0
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        rows = tl.load(offsets + slot, mask=slot < slots, other=0)
        end = rows_before + tl.cumsum(rows, axis=0)
        begin = end - rows
        tl.store(offsets + slot, begin, mask=slot < slots)
        needed = (rows + rows_per_tile - 1) // rows_per_tile
        tile = tiles_before + tl.cumsum(needed, axis=0) - needed
        for i in range(tl.max(needed, axis=0)):
            at = tiles + 3 * (tile + i)
            tl.store(at, slot, mask=i < needed)
            tl.store(at + 1, begin + i * rows_per_tile, mask=i < needed)
            tl.store(at + 2, tl.minimum(begin + (i + 1) * rows_per_tile, end), mask=i < needed)
        rows_before += tl.sum(rows, axis=0)
        tiles_before += tl.sum(needed, axis=0)
    tl.store(offsets + slots, rows_before)
    tl.store(tile_count, tiles_before)


@triton.jit
def _scatter(chunk, ids, counts, replicas, offsets, rows, pairs, experts, width, slots):
    i = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + i
    id = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
    known = (id >= 0) & (id < experts)
    earlier = (id[:, None] == id[None, :]) & (i[None, :] < i[:, None])
    arrival = tl.load(counts + chunk * experts + id, mask=known, other=0) + tl.sum(earlier.to(tl.int32), axis=1)
    copies = tl.maximum(_copies(replicas, id, known, width), 1)
    slot = tl.load(replicas + id * width + arrival % copies, mask=known, other=-1)
    known = known & (slot >= 0) & (slot < slots)
    tl.store(rows + tl.load(offsets + slot, mask=known, other=0) + arrival // copies, pair, mask=known)


@triton.jit
def dispatch_count(ids, counts, pairs, experts):
    """``counts`` i32 [chunks, E] from ``ids`` i64 [pairs]. Ids outside 0..E-1 are not counted. Grid: chunks."""
    _count(tl.program_id(0), ids, counts, pairs, experts)


@triton.jit
def dispatch_scan(counts, replicas, offsets, tiles, tile_count, chunks, experts, width, slots, rows_per_tile):
    """``counts`` become the arrivals before each chunk. ``offsets`` i32 [S+1]; ``tiles`` i32 [:, 3]: slot, first row, end.

    ``replicas`` i32 [E, width], padded with -1; ``tile_count`` i32 [1]. A tile has up to ``rows_per_tile`` rows of a slot. Grid:
    1.
    """
    _scan(counts, replicas, offsets, tiles, tile_count, chunks, experts, width, slots, rows_per_tile)


@triton.jit
def dispatch_scatter(ids, counts, replicas, offsets, rows, pairs, experts, width, slots):
    """``rows`` i32 [pairs]: the pairs grouped by slot, ascending inside a slot. Grid: chunks."""
    _scatter(tl.program_id(0), ids, counts, replicas, offsets, rows, pairs, experts, width, slots)


@triton.jit
def dispatch_small(ids, counts, replicas, offsets, tiles, tile_count, rows, pairs, experts, width, slots, rows_per_tile):
    """Count, scan and scatter, one after another. Grid: 1."""
    chunks = (pairs + CHUNK - 1) // CHUNK
    for chunk in range(chunks):
        _count(chunk, ids, counts, pairs, experts)
    tl.debug_barrier()
    _scan(counts, replicas, offsets, tiles, tile_count, chunks, experts, width, slots, rows_per_tile)
    tl.debug_barrier()
    for chunk in range(chunks):
        _scatter(chunk, ids, counts, replicas, offsets, rows, pairs, experts, width, slots)
