"""One MoE layer on the CPU: our kernels against ONNX Runtime's MoE, QMoE and MatMulNBits and torch's grouped_mm.

All variants of a cell (shape, format, threads, tokens, routing) run in turn, and between them a probe measures what the machine
can do, so that whatever else it does meets all of them; times and ceilings are medians. Every variant is first checked against
ours. ``roofline`` is the time that the touched weights at that read bandwidth, or the multiply-adds at that peak, need at least,
over the time taken.

    python benchmarks/moe_layer.py --quick
    python benchmarks/moe_layer.py -o benchmarks/results/moe_layer.json
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from machine import Machine, Probe
from moe_variants import Batch, Builder, Run, Shape, formats_of

from rq_compile.quantization.formats import Format

SHAPES = [
    Shape("H1024-F2816-E16-k2", 1024, 2816, 16, 2),
    Shape("OLMoE", 2048, 1024, 64, 8),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
]
LARGE = Shape("Mixtral", 4096, 14336, 8, 2)
TOKENS = (1, 4, 16, 64, 256, 1024)
FORMATS = ("fp32", "int8", "int4", "mixed")
ROUTINGS = ("uniform", "skewed")
BATCHES = 16  # with few tokens, runs in a row must not find their experts in a cache
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 1.5, 5, 60
OURS = "rq.moe"


def batch(shape: Shape, tokens: int, routing: str, seed: int) -> Batch:
    """Experts are drawn without replacement, all alike or, skewed, the e-th with weight 1 / (e + 1)."""
    random = np.random.default_rng(seed)
    weight = np.log(1 / np.arange(1, shape.experts + 1)) if routing == "skewed" else np.zeros(shape.experts)
    keys = weight + random.gumbel(size=(tokens, shape.experts))
    ids = np.ascontiguousarray(np.argsort(-keys, axis=1)[:, : shape.top_k])
    gates = random.uniform(0.5, 1, ids.shape).astype(np.float32)
    gates /= gates.sum(1, keepdims=True)
    # Their softmax, over the top k and normalized, is the gates.
    logits = np.full((tokens, shape.experts), -30, np.float32)
    np.put_along_axis(logits, ids, np.log(gates), axis=1)
    return Batch(random.standard_normal((tokens, shape.hidden), np.float32), ids, gates, logits)


def variants(builder: Builder, format: str, threads: int) -> dict[str, Run]:
    built = {OURS: builder.rewritten(format, "native", 8, threads)}
    if format == "fp32":
        built["stock Gemm in If"] = builder.rewritten(format, "stock", 32, threads)
        built["MoE"] = builder.fused(format, threads)
        built["torch grouped_mm"] = builder.grouped_mm(threads)
        return built
    built[f"{OURS} fp32 activations"] = builder.rewritten(format, "native", 32, threads)
    built["MatMulNBits in If, accuracy 4"] = builder.rewritten(format, "stock", 8, threads)
    built["MatMulNBits in If, accuracy 0"] = builder.rewritten(format, "stock", 32, threads)
    if format != "mixed":
        built["QMoE"] = builder.fused(format, threads)
    return built


def check(built: dict[str, Run], inputs: Batch) -> None:
    """
    Raises:
        AssertionError: a variant computes something else.
    """
    expected = built[OURS](inputs)
    for name, run in built.items():
        error = np.linalg.norm(run(inputs) - expected) / np.linalg.norm(expected)
        assert error < 0.02, f"{name} differs from {OURS} by {error:.3f}"


def timed(built: dict[str, Run], batches: list[Batch], probe: Probe, threads: int) -> tuple[dict[str, float], Machine]:
    """Median seconds of each variant, and the machine meanwhile: all run in turn."""
    times: dict[str, list[float]] = {name: [] for name in built}
    machines = []
    start = time.perf_counter()
    for round in range(MAX_ROUNDS):
        if round >= MIN_ROUNDS and time.perf_counter() - start > SECONDS * len(built):
            break
        machines.append(probe.machine(threads))
        inputs = batches[round % len(batches)]
        for name, run in built.items():
            begin = time.perf_counter()
            run(inputs)
            times[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in times.items()}, Machine.of(machines, median)


def work(shape: Shape, format: str, batches: list[Batch]) -> tuple[float, dict[str, float]]:
    """Of a median batch: bytes of the weights that it touches, and multiply-adds by the peak they fall under."""
    formats = formats_of(shape, format)
    touched, macs = [], []
    kinds: dict[Format, str] = {"fp32": "fp32", "fp16": "fp32", "int8": "int8", "int4": "int4"}
    for _, ids, _, _ in batches:
        load = np.bincount(ids.reshape(-1), minlength=shape.experts)
        touched.append(sum(shape.geometry.expert_bytes(f) for f, n in zip(formats, load, strict=True) if n))
        by_kind = dict.fromkeys(kinds.values(), 0.0)
        for f, n in zip(formats, load, strict=True):
            by_kind[kinds[f]] += float(n) * 3 * shape.hidden * shape.intermediate
        macs.append(by_kind)
    return median(touched), {kind: median(m[kind] for m in macs) for kind in macs[0]}


def cells(shape: Shape, folder: Path, probe: Probe, args: argparse.Namespace) -> Iterator[tuple[list[dict], Machine]]:
    """The rows of one cell after the other, ours first, and the machine meanwhile."""
    builder = Builder(shape, folder)
    for format, threads in itertools.product(args.formats, args.threads):
        built = variants(builder, format, threads)
        for tokens, routing in itertools.product(args.tokens, args.routings):
            batches = [batch(shape, tokens, routing, seed) for seed in range(BATCHES if tokens <= 16 else 2)]
            check(built, batches[0])
            touched, macs = work(shape, format, batches)
            seconds, machine = timed(built, batches, probe, threads)
            bound = max(touched / machine.bandwidth, sum(n / machine.peaks[kind] for kind, n in macs.items()))
            rows = [
                {
                    "shape": shape.name,
                    "tokens": tokens,
                    "format": format,
                    "threads": threads,
                    "routing": routing,
                    "variant": variant,
                    "ms": round(taken * 1e3, 4),
                    "gbytes_per_s": round(touched / taken / 1e9, 2),
                    "gflops": round(2 * sum(macs.values()) / taken / 1e9, 1),
                    "roofline": round(bound / taken, 3),
                }
                for variant, taken in seconds.items()
            ]
            yield rows, machine


def report(cell: list[dict]) -> None:
    """One line: ours, and each other variant's time over ours."""
    ours, *others = cell
    head = f"{ours['shape']:19} {ours['format']:5} T={ours['tokens']:<5} {ours['threads']} threads {ours['routing']:8}"
    speeds = (
        f"{ours['ms']:9.3f} ms {ours['gbytes_per_s']:6.1f} GB/s {ours['gflops']:6.1f} GFLOP/s roofline {ours['roofline']:.2f}"
    )
    ratios = ", ".join(f"{row['variant']} {row['ms'] / ours['ms']:.2f}x" for row in others)
    print(f"{head} {speeds} | {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, uniform routing, 1, 16 and 256 tokens")
    parser.add_argument("--large", action="store_true", help="add Mixtral's shape, at 4 bits only")
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES], help="default: all")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("-o", "--output", type=Path, help="where the rows go, as JSON")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.routings = [SHAPES[0].name], (1, 16, 256), ("uniform",)
    probe = Probe()
    found: list[dict] = []
    machines: dict[int, list[Machine]] = {threads: [] for threads in args.threads}
    chosen = [shape for shape in SHAPES if shape.name in args.shapes]
    for shape in [*chosen, *([LARGE] if args.large else [])]:
        if shape is LARGE:
            args.formats = ["int4"]
        with tempfile.TemporaryDirectory() as folder:
            for rows, machine in cells(shape, Path(folder), probe, args):
                report(rows)
                found += rows
                machines[rows[0]["threads"]].append(machine)
                if args.output:
                    write(args.output, found, machines)
    for threads, several in machines.items():
        print(f"{threads} threads at best: {Machine.of(several, max)}")


def write(output: Path, rows: list[dict], machines: dict[int, list[Machine]]) -> None:
    """``machine``: the best ceilings of the cells so far, and how busy the machine is besides."""
    best = {threads: Machine.of(several, max) for threads, several in machines.items() if several}
    ceilings = [
        {"threads": threads, "gbytes_per_s": round(machine.bandwidth / 1e9, 2)}
        | {f"{kind}_gflops": round(2 * peak / 1e9, 1) for kind, peak in machine.peaks.items()}
        for threads, machine in best.items()
    ]
    document = {"machine": ceilings, "load_average": round(os.getloadavg()[2], 1), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
