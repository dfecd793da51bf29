"""The cases that CI interprets and that a GPU runs: every kernel, stage by stage, compared with float64."""

import zlib
from dataclasses import dataclass, replace

import torch

from rq_kernels import launch, reference, tiles
from rq_kernels.formats import GROUPS
from rq_kernels.reference import Example

SHARED_EXPERTS = ((0, 1, 2), (3, -1, -1), (4, -1, -1))  # three slots of the first expert
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Allowed errors relative to the largest result: fp32 sums in the kernel's order, which tensor cores truncate; exp and erf of the
# hardware.
ARITHMETIC = {"cpu": 5e-6, "cuda": 3e-5}


@dataclass(frozen=True)
class Case:
    """``formats`` of the slots (places in ``formats.GROUPS``) and a batch.

    ``routing``: uniform, one (all tokens to the last expert), nan (a token of NaN), absent (ids outside the table).
    """

    name: str
    formats: tuple[int, ...] = (0, 1, 2, 1, 2)
    replicas: tuple[tuple[int, ...], ...] = SHARED_EXPERTS
    hidden: int = 256
    intermediate: int = 128
    activation: str = "swiglu"
    tokens: int = 9
    top_k: int = 2
    block: int = 128
    bias: bool = False
    dtype: torch.dtype = torch.float16
    size: str = "decode"
    routing: str = "uniform"
    limit: float = 0.8  # low enough to have an effect in clamped_swiglu


ONE_EACH = ((0,), (1,), (2,), (3,))
SMALL = Case("", hidden=64, intermediate=48, block=32)
CASES = [
    Case("float16", formats=(0,) * 5),
    Case("bfloat16", formats=(0,) * 5, dtype=torch.bfloat16),
    Case("int8", formats=(1,) * 5),
    Case("int8 bf16", formats=(1,) * 5, dtype=torch.bfloat16),
    Case("int4", formats=(2,) * 5),
    Case("int4 bf16", formats=(2,) * 5, dtype=torch.bfloat16),
    Case("mxfp4", formats=(3,) * 5, block=32),
    Case("mxfp4 bf16", formats=(3,) * 5, block=32, dtype=torch.bfloat16, bias=True),
    Case("mxfp4, odd sizes, batch tiles", (3, 3), ((0,), (1,)), 75, 53, tokens=70, top_k=1, block=32, size="batch"),
    replace(SMALL, name="mxfp4, all on one slot", formats=(3,) * 5, tokens=40, top_k=1, routing="one"),
    replace(SMALL, name="mxfp4 beside other formats", formats=(0, 1, 2, 3, 3)),
    Case("fp8", formats=(4,) * 5),
    Case("fp8 bf16", formats=(4,) * 5, dtype=torch.bfloat16, bias=True),
    Case("fp8, odd sizes, batch tiles", (4, 4), ((0,), (1,)), 75, 53, tokens=70, top_k=1, block=32, size="batch"),
    Case("fp8 beside other formats", formats=(0, 1, 2, 4, 4), dtype=torch.bfloat16),
    Case("int3", formats=(5,) * 5),
    Case("int3 bf16, block 64", formats=(5,) * 5, hidden=192, intermediate=64, block=64, dtype=torch.bfloat16, bias=True),
    Case("int3, odd sizes, batch tiles", (5, 5), ((0,), (1,)), 75, 53, tokens=70, top_k=1, block=16, size="batch"),
    Case("int2", formats=(6,) * 5),
    Case("int2 bf16, block 64", formats=(6,) * 5, hidden=192, intermediate=64, block=64, dtype=torch.bfloat16, bias=True),
    Case("int2, odd sizes, batch tiles", (6, 6), ((0,), (1,)), 75, 53, tokens=70, top_k=1, block=32, size="batch"),
    Case("few bits beside other formats", formats=(5, 1, 6, 2, 0)),
    Case("few bits, batch tiles", formats=(6, 0, 5, 1, 2), hidden=128, intermediate=144, tokens=70, size="batch"),
    Case("few bits, padded", (5, 6, 2), ((2, -1), (0, 1)), 200, 72, tokens=90, top_k=1, size="batch"),
    replace(SMALL, name="few bits, all on one slot", formats=(2, 1, 6, 5, 6), tokens=40, top_k=1, routing="one"),
    replace(SMALL, name="few bits, a token of NaN", formats=(6, 5, 0, 5, 6), routing="nan"),
    Case("mixed bf16", dtype=torch.bfloat16),
    Case("batch tiles", size="batch", tokens=70, hidden=128, intermediate=144),
    Case("prefill tiles", (0, 2, 1), ((2, -1), (0, 1)), size="prefill", tokens=90, top_k=1, hidden=144),
    Case("prefill tiles int4", (2, 2), ((0,), (1,)), size="prefill", tokens=150, top_k=1, hidden=128),
    Case("one token", tokens=1, top_k=1),
    Case("one token, three choices", tokens=1, top_k=3),
    Case("no token", tokens=0),
    Case("empty slots", formats=(0, 1, 2, 2), replicas=ONE_EACH, tokens=2, top_k=1),
    replace(SMALL, name="all on one slot", tokens=40, top_k=1, routing="one"),
    replace(SMALL, name="all on one slot, batch tiles", tokens=70, top_k=1, routing="one", size="batch"),
    Case("odd sizes", hidden=37, intermediate=53, block=16, bias=True),
    Case("odd sizes, gelu", hidden=75, intermediate=21, block=16, activation="gelu"),
    Case("block 64", hidden=192, intermediate=128, block=64),
    Case("block 32", hidden=96, intermediate=160, block=32, size="batch"),
    Case("block 128, padded", hidden=200, intermediate=72),
    replace(SMALL, name="clamped_swiglu with biases", activation="clamped_swiglu", bias=True),
    Case("clamped_swiglu, bf16", activation="clamped_swiglu", bias=True, dtype=torch.bfloat16, block=64, intermediate=192),
    replace(SMALL, name="limited_swiglu", activation="limited_swiglu"),
    replace(SMALL, name="geglu", activation="geglu"),
    replace(SMALL, name="geglu_tanh with biases", activation="geglu_tanh", bias=True),
    replace(SMALL, name="relu with biases", activation="relu", bias=True),
    replace(SMALL, name="relu2", activation="relu2"),
    replace(SMALL, name="no activation", activation="none", size="batch"),
    replace(SMALL, name="a token of NaN", routing="nan", tokens=20),
    replace(SMALL, name="a token of NaN, relu", routing="nan", activation="relu"),
    replace(SMALL, name="a token of NaN, clamped", routing="nan", activation="clamped_swiglu"),
    replace(SMALL, name="ids outside the table", routing="absent", tokens=20, top_k=3),
]

# Real sizes, for a GPU: the interpreter would take hours.
LARGE = [
    replace(case, name=f"{case.name}, {size}, T={tokens}", size=size, tokens=tokens)
    for case in (
        Case("OLMoE", (1, 2, 0, 2) * 16, tuple((e,) for e in range(64)), 2048, 1024, top_k=8),
        Case("OLMoE bf16", (2,) * 64, tuple((e,) for e in range(64)), 2048, 1024, top_k=8, dtype=torch.bfloat16),
        Case("H1024-F2816", (2, 1) * 8, tuple((e,) for e in range(16)), 1024, 2816),
        Case("DeepSeek-V2-Lite", (0, 1, 2, 2) * 16, tuple((e,) for e in range(64)), 2048, 1408, top_k=6),
        Case("few bits", (5, 6, 2, 6, 1, 5, 6, 6) * 8, tuple((e,) for e in range(64)), 2048, 1024, top_k=8),
        Case("few bits bf16", (6, 5) * 32, tuple((e,) for e in range(64)), 2048, 1408, top_k=6, dtype=torch.bfloat16),
        Case("GPT-OSS", (2,) * 32, tuple((e,) for e in range(32)), 2880, 2880, "clamped_swiglu", top_k=4, block=64, bias=True),
    )
    for size, tokens in (("decode", 1), ("decode", 16), ("batch", 300), ("prefill", 1000))
    if size in tiles.FEW_BITS or not any(GROUPS[format].few_bits for format in case.formats)
]


def worst(case: Case, seed: int, device: str = "cpu") -> dict[str, float]:
    """For each stage, the largest error divided by the allowed error: up to 1 is correct. For Dispatch, and for a second run on a
    GPU, the value is 0 or infinite.

    The allowed error is the rounding of the result to ``case.dtype`` plus ``ARITHMETIC``, so that a superfluous rounding of a
    weight or a sum is detected. The input of each stage is the output of the kernel before it.
    """
    random = torch.Generator().manual_seed(seed ^ zlib.crc32(case.name.encode()))
    held = reference.example(
        random, list(case.formats), case.hidden, case.intermediate, case.activation,
        replicas=[list(row) for row in case.replicas], block=case.block, bias=case.bias, dtype=case.dtype, device=device,
    )  # fmt: skip
    held = replace(held, layer=replace(held.layer, limit=case.limit))
    x, ids, gates = batch(case, random)
    slots = reference.routed_slots(ids, held.layer.replicas)
    on = [tensor.to(device) for tensor in (x, ids, gates)]
    return _stages(case, held, slots, *on)


def batch(case: Case, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x [T, hidden]``, ``ids`` i64 [T, k], all different inside a token, ``gates`` f32 [T, k]; on the CPU."""
    experts = len(case.replicas)
    x = torch.randn(case.tokens, case.hidden, generator=random).to(case.dtype)
    ids = torch.rand(case.tokens, experts, generator=random).argsort(1)[:, : case.top_k].contiguous()
    if case.routing == "one":
        ids = torch.full_like(ids, experts - 1)
    elif case.routing == "nan":
        x[case.tokens // 2] = float("nan")
    elif case.routing == "absent":
        ids[::3, 0], ids[1::3, 1] = -1, experts + 7
    return x, ids, torch.rand(case.tokens, case.top_k, generator=random)


def _stages(
    case: Case, held: Example, slots: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor
) -> dict[str, float]:
    layer, up_tile, down_tile = held.layer, tiles.UP[case.size], tiles.DOWN[case.size]
    rows, offsets = reference.grouped(slots, layer.slots)
    here = rows.long()
    errors: dict[str, float] = {}
    for name, small in (("dispatch_small", tiles.SMALL), ("dispatch", 0)):
        routed = launch.route(ids, layer.replicas, layer.slots, up_tile.rows, small if len(slots) else 1)
        same = torch.equal(routed.offsets.cpu(), offsets) and torch.equal(routed.rows.cpu()[: len(rows)], rows)
        errors[name] = 0.0 if same and covers(routed, offsets, up_tile.rows) else float("inf")
    middle = launch.up(x, routed, layer, up_tile)
    errors["up"] = _error(middle[: len(rows)], reference.up(x.cpu(), slots, held)[here])
    by_pair = torch.zeros(len(slots), case.intermediate, dtype=torch.float64)
    by_pair[here] = middle.cpu().double()[: len(rows)]
    outputs = launch.down(middle, routed, gates, layer, down_tile)
    errors["down"] = _error(outputs[here.to(x.device)], reference.down(by_pair, slots, gates.cpu(), held)[here])
    answer = launch.combine(outputs, ids, len(layer.replicas))
    weighted = torch.zeros(len(slots), case.hidden, dtype=torch.float64)
    weighted[here] = outputs.cpu().double()[here]
    errors["combine"] = _error(answer, weighted.reshape(*ids.shape, case.hidden).sum(1))
    if x.is_cuda:  # the interpreter has a fixed order
        again = launch.moe_layer(x, ids, gates, layer, case.size)
        errors["again"] = 0.0 if torch.equal(again.view(torch.int16), answer.view(torch.int16)) else float("inf")
    return errors


def covers(routed: launch.Routed, offsets: torch.Tensor, rows: int) -> bool:
    """Whether the row tiles are those of each slot in turn, and fit into the buffer for the worst batch."""
    expected = [
        [slot, begin, min(begin + rows, int(offsets[slot + 1]))]
        for slot in range(len(offsets) - 1)
        for begin in range(int(offsets[slot]), int(offsets[slot + 1]), rows)
    ]
    return len(expected) <= len(routed.tiles) and routed.tiles[: int(routed.tile_count)].tolist() == expected


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    if not len(exact):
        return 0.0 if ours.shape == exact.shape else float("inf")
    rounding, arithmetic, ours = ROUNDING[ours.dtype], ARITHMETIC[ours.device.type], ours.cpu().double()
    if not torch.equal(ours.isnan(), exact.isnan()) or exact.isnan().all():
        return float("inf")
    ours, exact = ours.nan_to_num(0), exact.nan_to_num(0)
    allowed = rounding * exact.abs() + arithmetic * exact.abs().max()
    return float(((ours - exact).abs() / allowed.clamp_min(1e-30)).max())
