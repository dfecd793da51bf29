"""One MoE layer on a GPU: our kernels against torch's grouped_mm and a plain fused MoE kernel in Triton. Needs torch and Triton.

All variants of a cell (shape, format, tokens, routing) run in turn, each as a CUDA graph, with the caches overwritten in between;
times are medians. Every variant is first checked against ours. ``roofline`` is the time that the touched weights need at the
memory bandwidth, or that the multiply-adds need at the rate of a large matrix product, divided by the time taken; bandwidth and
rate are measured in the same run. The baseline uses its best tile. Not run yet: no GPU was available.

    python benchmarks/gpu_moe_layer.py --quick
    python benchmarks/gpu_moe_layer.py -o benchmarks/results/gpu_moe_layer.json
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from provenance import provenance

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "plugins" / "kernels")]

if TYPE_CHECKING:
    from gpu_moe_baseline import Uniform
    from rq_kernels.launch import Layer

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
# The format codes of the experts, in turn. Without scales, "mixed" has 6.5 bits a weight on average, and "few" 3.4.
FORMATS = {
    "bf16": (0,),
    "int8": (1,),
    "int4": (2,),
    "int3": (5,),
    "int2": (6,),
    "mixed": (0, 1, 1, 2, 2, 2, 2, 2),
    "few": (1, 2, 5, 5, 5, 6, 6, 6),
}
ROUTINGS = ("uniform", "skewed")
ROUNDS = 30
OURS = "rq.moe"
FLUSH = 256 << 20  # bytes: more than any second-level cache


@dataclass(frozen=True)
class Shape:
    """A SwiGLU MoE layer of some model."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = (
    Shape("H1024-F2816-E16-k2", 1024, 2816, 16, 2),
    Shape("OLMoE", 2048, 1024, 64, 8),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Shape("Mixtral", 4096, 14336, 8, 2),
)
BLOCK = 128


def formats_of(shape: Shape, format: str) -> list[int]:
    """The format code of each expert."""
    return [FORMATS[format][e % len(FORMATS[format])] for e in range(shape.experts)]


def routing(shape: Shape, tokens: int, kind: str, seed: int) -> torch.Tensor:
    """i64 [T, k], drawn without replacement: all experts with equal weight or, if skewed, the e-th with weight 1 / (e + 1)."""
    random = torch.Generator().manual_seed(seed)
    weight = -torch.arange(1, shape.experts + 1).log() if kind == "skewed" else torch.zeros(shape.experts)
    gumbel = -torch.empty(tokens, shape.experts).exponential_(generator=random).log()
    return (weight + gumbel).argsort(1, descending=True)[:, : shape.top_k].contiguous()


def work(shape: Shape, formats: list[int], ids: torch.Tensor) -> tuple[float, float]:
    """Bytes of the weights that a batch touches, and its multiply-adds."""
    from rq_kernels.formats import GROUPS

    matrix = 3 * shape.hidden * shape.intermediate
    bits = [GROUPS[code].bits + 32 / BLOCK if code else 16 for code in formats]
    touched = sum(bits[e] / 8 * matrix for e in ids.unique().tolist())
    return touched, float(ids.numel() * matrix)


def layer(shape: Shape, formats: list[int], device: str) -> "Layer":
    """Our layer with random weights, made on the device."""
    from rq_kernels.formats import GROUPS
    from rq_kernels.launch import Layer, Projection

    codes = torch.tensor(formats, dtype=torch.int32, device=device)
    index = torch.stack([codes == code for code in range(len(GROUPS))]).cumsum(1).gather(0, codes[None].long())[0].int() - 1

    def projection(N: int, K: int) -> Projection:
        held: dict[str, torch.Tensor] = {}
        for code in sorted(set(formats)):
            count, group = formats.count(code), GROUPS[code]
            if not group.bits:
                held[group.tensors[0]] = torch.randn(count, N, K, device=device, dtype=torch.bfloat16) / K**0.5
                continue
            packed, scales = group.tensors
            held[packed] = torch.randint(1, 256, (count, N, K * group.bits // 8), dtype=torch.uint8, device=device)
            spread = 0.5 + torch.rand(count, N, K // BLOCK, device=device)
            held[scales] = spread / (2 ** (group.bits - 1) * K**0.5)
        return Projection(index, held)

    replicas = torch.arange(shape.experts, dtype=torch.int32, device=device)[:, None]
    up, down = projection(2 * shape.intermediate, shape.hidden), projection(shape.hidden, shape.intermediate)
    return Layer(shape.hidden, shape.intermediate, "swiglu", codes, replicas, up, down)


def uniform(held: "Layer", code: int) -> "Uniform":
    """The same weights, all in one format, for the baseline."""
    from gpu_moe_baseline import Uniform

    packed, scales = (("float_weights", None), ("int8_packed", "int8_scales"), ("int4_packed", "int4_scales"))[code]
    of = lambda projection, name: projection.weights.get(name)  # noqa: E731
    return Uniform(
        (16, 8, 4)[code],
        of(held.up, packed), of(held.down, packed), of(held.up, scales), of(held.down, scales), held.intermediate,
    )  # fmt: skip


Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def variants(held: "Layer", format: str, size: str) -> dict[str, Run]:
    """The variants to compare, ours first. Only ours can run mixed formats, 3 bits and 2 bits."""
    import gpu_moe_baseline as baseline
    from rq_kernels import launch

    built: dict[str, Run] = {OURS: lambda x, ids, gates: launch.moe_layer(x, ids, gates, held, size)}
    if format in ("bf16", "int8", "int4"):
        same = uniform(held, FORMATS[format][0])
        for tile in baseline.TILES:
            built[f"fused MoE {tile}"] = partial(baseline.triton_layer, held=same, tile=tile)
    if format == "bf16":
        up, down = held.up.weights["float_weights"], held.down.weights["float_weights"]
        built["torch grouped_mm"] = lambda x, ids, gates: baseline.grouped_mm_layer(x, ids, gates, up, down)
    return built


def best_tile(times: dict[str, float]) -> dict[str, float]:
    """``times`` with only the fastest tile of the baseline."""
    fused = {name: t for name, t in times.items() if name.startswith("fused MoE")}
    worse = set(fused) - {min(fused, key=fused.__getitem__)} if fused else set()
    return {name: t for name, t in times.items() if name not in worse}


def check(built: dict[str, Run], inputs: tuple[torch.Tensor, ...]) -> None:
    """
    Raises:
        AssertionError: a variant's result differs.
    """
    expected = built[OURS](*inputs).float()
    for name, run in built.items():
        error = float((run(*inputs).float() - expected).norm() / expected.norm())
        assert error < 0.02, f"{name} differs from {OURS} by {error:.3f}"


def timed(built: dict[str, Run], inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Median seconds of each variant as a CUDA graph. All run in turn, with the caches overwritten in between."""
    graphs = {}
    for name, run in built.items():
        run(*inputs)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            run(*inputs)
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            flush.zero_()
            times[name].append(_seconds(graph.replay))
    return {name: median(each) for name, each in times.items()}


def ceilings() -> tuple[float, float]:
    """Bytes/s read by a reduction, and multiply-adds/s of a large bf16 product."""
    data = torch.ones(1 << 30, dtype=torch.int32, device="cuda")
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    bandwidth = 4 * len(data) / median(_seconds(data.amax) for _ in range(10))
    return bandwidth, 8192**3 / median(_seconds(lambda: a @ b) for _ in range(10))


def _seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cell(shape: Shape, held: "Layer", format: str, tokens: int, kind: str, limits: tuple[float, float]) -> list[dict]:
    """The rows of one cell, ours first."""
    from rq_kernels import tiles

    ids = routing(shape, tokens, kind, seed=tokens)
    size = tiles.choose(ids.reshape(-1).bincount(minlength=shape.experts).tolist(), held.sizes)
    gates = torch.rand(tokens, shape.top_k, device="cuda")
    inputs = (
        torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16),
        ids.cuda(),
        gates / gates.sum(1, keepdim=True),
    )
    built = variants(held, format, size)
    check(built, inputs)
    touched, macs = work(shape, formats_of(shape, format), ids)
    bound = max(touched / limits[0], macs / limits[1])
    return [
        {
            "shape": shape.name,
            "tokens": tokens,
            "format": format,
            "routing": kind,
            "variant": variant,
            "tiles": size if variant == OURS else None,
            "us": round(taken * 1e6, 2),
            "gbytes_per_s": round(touched / taken / 1e9, 1),
            "tflops": round(2 * macs / taken / 1e12, 2),
            "roofline": round(bound / taken, 3),
        }
        for variant, taken in best_tile(timed(built, inputs)).items()
    ]


def report(rows: list[dict]) -> None:
    """Print one line: our time, and each other variant's time divided by ours."""
    ours, *others = rows
    head = f"{ours['shape']:19} {ours['format']:5} T={ours['tokens']:<5} {ours['routing']:8} {ours['tiles']:8}"
    speeds = (
        f"{ours['us']:9.1f} us {ours['gbytes_per_s']:7.1f} GB/s {ours['tflops']:6.1f} TFLOP/s roofline {ours['roofline']:.2f}"
    )
    print(f"{head} {speeds} | " + ", ".join(f"{row['variant']} {row['us'] / ours['us']:.2f}x" for row in others), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, uniform routing, 1, 64 and 1024 tokens")
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], default=[shape.name for shape in SHAPES])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here; run this on a machine with one")
    if args.quick:
        args.shapes, args.tokens, args.routings = ["OLMoE"], (1, 64, 1024), ("uniform",)
    limits = ceilings()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "gbytes_per_s": round(limits[0] / 1e9, 1),
        "tflops": round(2 * limits[1] / 1e12, 1),
    }
    print(machine)
    rows: list[dict] = []
    origin = provenance("rq-compile", "torch", "triton")
    for shape, format in itertools.product([s for s in SHAPES if s.name in args.shapes], args.formats):
        held = layer(shape, formats_of(shape, format), "cuda")
        for tokens, kind in itertools.product(args.tokens, args.routings):
            found = cell(shape, held, format, tokens, kind, limits)
            report(found)
            rows += found
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps({"machine": machine, **origin, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
