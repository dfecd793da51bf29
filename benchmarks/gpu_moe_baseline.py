"""What the GPU benchmark compares with: torch's grouped_mm, and a fused MoE kernel in Triton of the usual kind.

The latter multiplies ``x @ W^T`` with weights in one format for all experts, which are scaled while they are unpacked. torch
computes the activation and the sum. Its pairs are grouped by our Dispatch, which is faster than torch's sort would be.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.append(str(Path(__file__).parents[1] / "plugins" / "kernels"))

from rq_kernels import launch


@triton.jit
def fused_moe(  # type: ignore[no-untyped-def]  # a function in Triton's language takes its values
    x, weights, scales, y, gates, rows, tiles, tile_count, columns, outputs, divide,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``y [pairs, outputs]``, row p from ``x[p // divide]``; ``weights`` [E, outputs, columns * BITS / 8] as ours.

    Grid: row tiles, strips of outputs.
    """
    if tl.program_id(0) >= tl.load(tile_count):
        return
    tile = tiles + 3 * tl.program_id(0)
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    present = row < tl.load(tile + 2)
    expert = tl.load(tile).to(tl.int64)
    pair = tl.load(rows + row, mask=present, other=0)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = n < outputs
    dtype: tl.constexpr = x.dtype.element_ty
    stride = columns * BITS // 8 if BITS < 16 else columns
    weights += expert * outputs * stride
    scales += expert * outputs * (columns // BLOCK)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        inside = (k < columns)[None, :]
        a = tl.load(x + (pair // divide).to(tl.int64)[:, None] * columns + k[None, :], mask=present[:, None] & inside, other=0)
        if BITS == 16:
            w = tl.load(weights + n[:, None] * stride + k[None, :], mask=mask[:, None] & inside, other=0)
        else:
            if BITS == 8:
                q = (
                    tl.load(weights + n[:, None] * stride + k[None, :], mask=mask[:, None] & inside, other=128).to(tl.float32)
                    - 128
                )
            else:
                q = tl.load(weights + n[:, None] * stride + k[None, :] // 2, mask=mask[:, None] & inside, other=136)
                q = ((q >> (k[None, :] % 2 * 4).to(tl.uint8)) & 15).to(tl.float32) - 8
            scale = tl.load(scales + n * (columns // BLOCK) + start // BLOCK, mask=mask, other=0)
            w = (q * scale[:, None]).to(dtype)
        total = tl.dot(a, tl.trans(w), total)
    if WEIGHTED:
        total *= tl.load(gates + pair, mask=present, other=0)[:, None]
    at = y + pair.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(at, total.to(dtype), mask=present[:, None] & mask[None, :])


@dataclass(frozen=True)
class Uniform:
    """SwiGLU experts of one format: ``up [E, 2I, ...]``, ``down [E, H, ...]`` packed as in docs/kernels.md, scales or None."""

    bits: int
    up: torch.Tensor
    down: torch.Tensor
    up_scales: torch.Tensor | None
    down_scales: torch.Tensor | None
    intermediate: int


# Rows, outputs and columns of a tile, and warps: vLLM's fallback for few and for many tokens, and two larger tiles.
TILES = ((16, 32, 64, 4), (64, 64, 32, 4), (64, 128, 64, 4), (128, 128, 64, 8))


def triton_layer(
    x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, held: Uniform, tile: tuple[int, int, int, int]
) -> torch.Tensor:
    """``[T, H]``, with two calls of ``fused_moe``."""
    pairs, hidden, experts = ids.numel(), x.shape[1], len(held.up)
    routed = launch.route(ids, torch.arange(experts, dtype=torch.int32, device=ids.device)[:, None], experts, tile[0])

    def product(a: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None, outputs: int, divide: int) -> torch.Tensor:
        y = x.new_empty(pairs, outputs)
        fused_moe[(len(routed.tiles), -(-outputs // tile[1]))](
            a, weights, gates if scales is None else scales, y, gates, routed.rows, routed.tiles, routed.tile_count,
            a.shape[1], outputs, divide, BITS=held.bits, BLOCK=128, WEIGHTED=divide == 1,
            ROWS=tile[0], OUTPUTS=tile[1], COLUMNS=tile[2], num_warps=tile[3], num_stages=3,
        )  # fmt: skip
        return y

    gate, linear = product(x, held.up, held.up_scales, 2 * held.intermediate, ids.shape[1]).chunk(2, -1)
    out = product(torch.nn.functional.silu(gate) * linear, held.down, held.down_scales, hidden, 1)
    return out.view(*ids.shape, hidden).sum(1)


def grouped_mm_layer(
    x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """``[T, H]``, with torch's grouped_mm, for SwiGLU experts ``up [E, 2I, H]``, ``down [E, H, I]`` in bf16."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.zeros(len(up), dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts.cumsum(0).int()
    product = torch.nn.functional.grouped_mm
    gate, linear = product(x[order // ids.shape[1]], up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = product(torch.nn.functional.silu(gate) * linear, down.transpose(1, 2), offs=ends)
    out = out * gates.reshape(-1)[order][:, None].to(out.dtype)
    return torch.empty_like(out).index_copy_(0, order, out).view(*ids.shape, -1).sum(1)
