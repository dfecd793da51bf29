"""Runs the kernels on torch tensors, compiled by Triton on first use, for tests, checks and benchmarks.

An engine has neither torch nor Triton. Its launcher does the same with the built kernels and ``kernels.json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rq_kernels import activations, dispatch, expert_gemm, tiles
from rq_kernels import combine as combine_kernel
from rq_kernels.formats import FEW_BITS, GROUPS, TENSORS, formats_of
from rq_kernels.tiles import Tile


@dataclass(frozen=True)
class Projection:
    """One projection of a layer's slots.

    ``index`` i32 [S]: the index of each slot's matrix in its format group. ``weights``: the tensors of the groups that have
    slots, by the names in ``formats.TENSORS``; see docs/kernels.md. ``bias`` f32 [S, N]. ``block`` columns share a scale.
    """

    index: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    bias: torch.Tensor | None = None
    block: int = 128

    def operands(self) -> list[torch.Tensor]:
        """The operands in the kernels' order. Missing ones are replaced by tensors that are never read."""
        held = [self.weights.get(name, self._nothing(name)) for name in TENSORS]
        return [*held, self._nothing("bias") if self.bias is None else self.bias]

    def inputs(self) -> list[torch.Tensor]:
        """The inputs of a MoeLayer node, in order."""
        held = [self.weights[name] for name in TENSORS if name in self.weights]
        return [self.index, *held, *([] if self.bias is None else [self.bias])]

    def _nothing(self, name: str) -> torch.Tensor:
        dtypes = {"weights": torch.float16, "packed": torch.uint8}
        exponents = any(group.exponents and name in group.tensors for group in GROUPS)
        return self.index.new_empty(0, dtype=torch.uint8 if exponents else dtypes.get(name.rpartition("_")[2], torch.float32))


@dataclass(frozen=True)
class Layer:
    """``formats`` i32 [S]: places in ``formats.GROUPS``; ``replicas`` i32 [E, R]: the slots of each expert, padded with -1."""

    hidden: int
    intermediate: int
    activation: str
    formats: torch.Tensor
    replicas: torch.Tensor
    up: Projection
    down: Projection
    alpha: float = 1.702
    limit: float = 7.0

    @property
    def slots(self) -> int:
        return len(self.formats)

    @property
    def format_bits(self) -> int:
        """``FORMATS`` of the kernels. An engine knows it when it is built; here it follows from the weights, without the
        device."""
        return formats_of([code for code, group in enumerate(GROUPS) if group.tensors[0] in self.up.weights])

    @property
    def few_bits(self) -> bool:
        return self.format_bits == FEW_BITS

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the tiles that an engine has for the layer."""
        return tiles.FEW_BITS if self.few_bits else tuple(tiles.UP)


@dataclass(frozen=True)
class Routed:
    """The result of Dispatch: ``rows`` i32 [pairs], ``offsets`` i32 [S+1], ``tiles`` i32 [most, 3], ``tile_count`` i32 [1]."""

    rows: torch.Tensor
    offsets: torch.Tensor
    tiles: torch.Tensor
    tile_count: torch.Tensor


def route(ids: torch.Tensor, replicas: torch.Tensor, slots: int, rows_per_tile: int, small: int = tiles.SMALL) -> Routed:
    """Dispatch ``ids`` i64 [T, k]: up to ``small`` pairs in one launch, more pairs in three."""
    pairs, (experts, width) = ids.numel(), replicas.shape

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    chunks = -(-pairs // tiles.CHUNK)
    counts = ints(max(chunks, 1), experts)
    routed = Routed(ints(pairs), ints(slots + 1), ints(tiles.most_tiles(pairs, slots, rows_per_tile), 3), ints(1))
    map_of_tiles = routed.offsets, routed.tiles, routed.tile_count
    if pairs <= small:
        dispatch.dispatch_small[(1,)](
            ids, counts, replicas, *map_of_tiles, routed.rows, pairs, experts, width, slots, rows_per_tile
        )
        return routed
    dispatch.dispatch_count[(chunks,)](ids, counts, pairs, experts)
    dispatch.dispatch_scan[(1,)](counts, replicas, *map_of_tiles, chunks, experts, width, slots, rows_per_tile)
    dispatch.dispatch_scatter[(chunks,)](ids, counts, replicas, routed.offsets, routed.rows, pairs, experts, width, slots)
    return routed


def up(x: torch.Tensor, routed: Routed, layer: Layer, tile: Tile) -> torch.Tensor:
    """Activations ``[pairs, intermediate]`` by slot, from ``x [T, hidden]``."""
    pairs = len(routed.rows)
    y, tile = x.new_empty(pairs, layer.intermediate), tiles.fitted(tile, layer.up.block, few_bits=layer.few_bits)
    gated = layer.activation in activations.GATED
    if pairs:
        expert_gemm.expert_up[_grid(routed, layer.intermediate, tile)](
            x, routed.rows, routed.tiles, routed.tile_count, layer.formats, layer.up.index, *layer.up.operands(), y,
            pairs // len(x), layer.hidden, layer.intermediate, int(layer.up.bias is not None), layer.up.block,
            activations.NAMES.index(layer.activation), layer.alpha, layer.limit,
            GATED=gated, **_variant(layer, layer.up, tile),
        )  # fmt: skip
    return y


def down(x: torch.Tensor, routed: Routed, gates: torch.Tensor, layer: Layer, tile: Tile) -> torch.Tensor:
    """Gate-weighted outputs ``[pairs, hidden]`` by pair, from ``x [pairs, intermediate]`` by slot and ``gates`` f32 [T, k]."""
    y, tile = x.new_empty(len(x), layer.hidden), tiles.fitted(tile, layer.down.block, few_bits=layer.few_bits)
    if len(x):
        expert_gemm.expert_down[_grid(routed, layer.hidden, tile)](
            x, routed.rows, gates, routed.tiles, routed.tile_count, layer.formats, layer.down.index, *layer.down.operands(), y,
            layer.intermediate, layer.hidden, int(layer.down.bias is not None), layer.down.block,
            **_variant(layer, layer.down, tile),
        )  # fmt: skip
    return y


def combine(y: torch.Tensor, ids: torch.Tensor, experts: int) -> torch.Tensor:
    """The sum ``[T, hidden]`` over each token's choices of ``y [pairs, hidden]``."""
    tokens, top_k = ids.shape
    out = y.new_empty(tokens, y.shape[1])
    columns = tiles.COMBINE_COLUMNS
    if tokens:
        grid = (tokens, -(-y.shape[1] // columns))
        combine_kernel.combine[grid](y, ids, out, top_k, y.shape[1], experts, COLUMNS=columns)
    return out


def moe_layer(x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, layer: Layer, size: str) -> torch.Tensor:
    """The output of the layer ``[T, hidden]``, with the tiles named ``size``."""
    routed = route(ids, layer.replicas, layer.slots, tiles.UP[size].rows)
    middle = up(x, routed, layer, tiles.UP[size])
    return combine(down(middle, routed, gates, layer, tiles.DOWN[size]), ids, len(layer.replicas))


def _grid(routed: Routed, outputs: int, tile: Tile) -> tuple[int, int]:
    return len(routed.tiles), -(-outputs // tile.outputs)


def _variant(layer: Layer, projection: Projection, tile: Tile) -> dict[str, Any]:
    return {
        "FORMATS": layer.format_bits,
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "COLUMNS": tile.columns,
        "STEP": tile.step(projection.block),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
