"""Every kernel that is built: its dtype, formats, tiles and parameters, and how it is launched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rq_kernels import combine, dispatch, expert_gemm, tiles
from rq_kernels.formats import FEW_BITS, GROUPS, MIXED, TENSORS
from rq_kernels.tiles import CHUNK, COMBINE_COLUMNS, DOWN, UP, Tile, fitted

DTYPES = {"fp16": "*fp16", "bf16": "*bf16"}
# The formats that a layer's slots may have, as the kernels' FORMATS. "few" is right for any plan without mxfp4 and fp8, and
# "mixed" if there are no few bits either; the others need fewer resources.
FORMATS = {group.name: 1 << code for code, group in enumerate(GROUPS) if not group.few_bits} | {"mixed": MIXED, "few": FEW_BITS}

# Sizes and pointers that are multiples of 16, so that rows of x and of weights can be read 16 bytes at a time.
ALIGNED = ("columns", "outputs", "hidden")
# Columns that share a scale, in formats where this is not 64 or 128.
BLOCKS = {group.name: 32 for group in GROUPS if group.exponents}
FLOATS = ("alpha", "limit")
DATA = ("x", "y", "out", "float_weights")  # pointers to the dtype of the variant
POINTERS = {
    "ids": "*i64",
    **dict.fromkeys(["counts", "replicas", "offsets", "tiles", "tile_count", "rows", "formats", "weights"], "*i32"),
    **dict.fromkeys(["gates", "bias"], "*fp32"),
    **{group.tensors[1]: "*u8" if group.exponents else "*fp32" for group in GROUPS if group.bits},
    **{name: "*u8" for name in TENSORS if name.endswith("_packed")},
}


@dataclass(frozen=True)
class Variant:
    """``kernel``: a Triton function. ``parameters``: its arguments and their types, in order. ``grid``: formulas of the
    arguments.

    In a formula, ``ceil(a / b)`` rounds up, and ``row_tiles`` is ``tiles.most_tiles(pairs, slots, rows of a tile)``.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    parameters: dict[str, str]
    grid: tuple[str, str, str]
    warps: int = 4
    stages: int = 3


def variants(
    dtypes: Sequence[str] = tuple(DTYPES), formats: Sequence[str] = tuple(FORMATS), sizes: Sequence[str] = tuple(UP)
) -> Iterator[Variant]:
    """Dispatch first, then for each dtype Combine and the products."""
    chunks = (f"ceil(pairs / {CHUNK})", "1", "1")
    yield _variant("dispatch_count", dispatch.dispatch_count, {}, chunks)
    yield _variant("dispatch_scatter", dispatch.dispatch_scatter, {}, chunks)
    for kernel in (dispatch.dispatch_scan, dispatch.dispatch_small):
        yield _variant(kernel.__name__, kernel, {}, ("1", "1", "1"))
    for dtype in dtypes:
        grid = ("tokens", f"ceil(hidden / {COMBINE_COLUMNS})", "1")
        yield _variant(f"combine_{dtype}", combine.combine, {"COLUMNS": COMBINE_COLUMNS}, grid, dtype=dtype)
        for format in formats:
            for size in (name for name in sizes if format != "few" or name in tiles.FEW_BITS):
                yield from _products(f"{dtype}_{format}_{size}", size, dtype, format, BLOCKS.get(format, 128))
                # Tiles with steps of 128 columns cannot have scales for 64.
                if format not in ("float", "few", *BLOCKS) and UP[size].columns > 64:
                    yield from _products(f"{dtype}_{format}_{size}_block64", size, dtype, format, 64)


def _products(name: str, size: str, dtype: str, format: str, block: int) -> Iterator[Variant]:
    for gated in (True, False):
        kind = "gated" if gated else "plain"
        yield _product(f"up_{kind}_{name}", expert_gemm.expert_up, UP[size], dtype, format, block, GATED=gated)
    yield _product(f"down_{name}", expert_gemm.expert_down, DOWN[size], dtype, format, block)


def _product(name: str, kernel: Any, tile: Tile, dtype: str, format: str, block: int, **constants: Any) -> Variant:
    tile = fitted(tile, block, few_bits=format == "few")
    constants |= {"FORMATS": FORMATS[format], "ROWS": tile.rows, "OUTPUTS": tile.outputs}
    constants |= {"COLUMNS": tile.columns, "STEP": tile.step(block)}
    grid = ("row_tiles", f"ceil(outputs / {tile.outputs})", "1")
    return _variant(name, kernel, constants, grid, dtype=dtype, warps=tile.warps, stages=tile.stages)


def _variant(
    name: str, kernel: Any, constants: dict[str, Any], grid: tuple[str, str, str], dtype: str = "fp16", **launch: int
) -> Variant:
    types = dict.fromkeys(DATA, DTYPES[dtype]) | POINTERS | dict.fromkeys(FLOATS, "fp32")
    parameters = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    return Variant(name, kernel, constants, parameters, grid, **launch)
