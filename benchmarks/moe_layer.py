"""One MoE layer on the CPU: our kernels against ONNX Runtime's MoE, QMoE and MatMulNBits, torch's grouped_mm and llama.cpp.

All variants of a cell (shape, format, threads, tokens), with each routing, run in turn. Between them a probe measures the
ceilings of the machine, so that other load affects all of them equally; times and ceilings are medians. Every variant is first
checked against ours. A variant's threads are asleep when a run begins. With few tokens, each run follows an untimed run on
different experts, and before all runs there is an untimed run on each batch.
``roofline`` is the least time that the touched weights need at that read bandwidth, or the multiply-adds at that peak, divided by
the time taken. The bytes are those of our formats, even if a variant's formats take slightly more (llama.cpp's: see
llama_cpp_layer.py). In standard operators, mxfp4 takes 8 bits and fp8 32.

Without --full, the following is measured: uniform routing with one thread in all formats, and with two in all but fp32; the
other routings at 16 and 256 tokens, skewed for int4 and mixed, even for int4; Mixtral's shape up to 64 tokens, at 8 and at 4
bits; no layer of more than 1.7 GB, since every variant holds it once, which takes 8 GB; and, for quantized weights, neither our
kernels with fp32 activations nor MatMulNBits that multiplies in fp32, which is never the best stock variant. Without "fp32
activations", our kernels round x to int8 for quantized weights and to bf16 for bf16, in which torch computes as well. The rows
are written after each cell; an interrupt ends with the summary of the rows so far. Rows of other processors and of cells not
measured stay in the file, so that it can be measured in parts: --shapes, --formats, --tokens, --threads.

    python benchmarks/llama_cpp/build.py
    python benchmarks/moe_layer.py --quick
    python benchmarks/moe_layer.py -o benchmarks/results/moe_layer.json
"""

import argparse
import ctypes
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import llama_cpp_layer
import numpy as np
from machine import Machine, Probe
from moe_goals import CELL, OTHER_PRODUCT, OURS, Row, summary
from moe_variants import CARRIED, Batch, Builder, Run, Shape, formats_of
from provenance import processor, provenance

from rq_compile.quantization.formats import Format

SHAPES = [
    Shape("H1024-F2816-E16-k2", 1024, 2816, 16, 2),
    Shape("OLMoE", 2048, 1024, 64, 8),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Shape("Mixtral", 4096, 14336, 8, 2),
]
TOKENS = (1, 4, 16, 64, 256, 1024)
FLOATS = ("fp32", "fp16", "bf16")
NO_INTEGERS = (*FLOATS, "fp8")  # multiplied as floats, by fp32 activations or, of bf16, rounded ones
FORMATS = (*FLOATS, "int8", "int4", "int3", "int2", "mixed", *CARRIED)
ROUTINGS = ("uniform", "skewed", "even")
FEW = 16  # up to this many tokens, a run is short
BATCHES = 16  # with few tokens, successive runs must not find their experts in a cache
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 4, 5, 60  # per cell; an option sets other seconds
REST = 0.015  # seconds that torch's threads, the last of a round, need to stop spinning


class Cell(NamedTuple):
    """What all variants measure in one turn."""

    shape: Shape
    format: str
    threads: int
    tokens: int
    routing: str

    @property
    def chosen(self) -> bool:
        """Whether it is measured without --full."""
        large = self.shape.hidden * self.shape.intermediate > 2**24
        return (
            sum(self.shape.geometry.expert_bytes(format) for format in formats_of(self.shape, self.format)) <= 1.7e9
            and (not large or (self.tokens <= 64 and self.format != "mixed"))
            and (self.threads == 1 or self.format not in FLOATS)
            and (self.routing == "uniform" or self.tokens in (16, 256))
            and self.format in {"uniform": FORMATS, "skewed": ("int4", "mixed"), "even": ("int4",)}[self.routing]
        )


def batch(shape: Shape, tokens: int, routing: str, seed: int) -> Batch:
    """A batch of random tokens. Experts are drawn without replacement: all with equal weight or, if skewed, the e-th with weight
    1 / (e + 1).

    With even routing, the experts that the skewed batch of this seed touches are chosen in turn: the same bytes and work, evenly
    distributed.
    """
    random = np.random.default_rng(seed)
    weight = np.zeros(shape.experts) if routing == "uniform" else np.log(1 / np.arange(1, shape.experts + 1))
    keys = weight + random.gumbel(size=(tokens, shape.experts))
    ids = np.ascontiguousarray(np.argsort(-keys, axis=1)[:, : shape.top_k])
    if routing == "even":
        ids = np.resize(random.permutation(np.unique(ids)), ids.shape)
    gates = random.uniform(0.5, 1, ids.shape).astype(np.float32)
    gates /= gates.sum(1, keepdims=True)
    # Their softmax over the top k, normalized, gives the gates.
    logits = np.full((tokens, shape.experts), -30, np.float32)
    np.put_along_axis(logits, ids, np.log(gates), axis=1)
    return Batch(random.standard_normal((tokens, shape.hidden), np.float32), ids, gates, logits)


def variants(builder: Builder, format: str, threads: int, llama_cpp: ctypes.CDLL | None, full: bool) -> dict[str, Run]:
    built = {OURS: builder.rewritten(format, "native", 8, threads)}
    if format in NO_INTEGERS:
        built["stock Gemm in If"] = builder.rewritten(format, "stock", 32, threads)
    if format == "fp32":
        built["MoE"] = builder.fused(format, threads)
    if format not in NO_INTEGERS:
        built["MatMulNBits in If, accuracy 4"] = builder.rewritten(format, "stock", 8, threads)
    if format == "bf16" or (full and format not in NO_INTEGERS):
        built[f"{OURS} fp32 activations"] = builder.rewritten(format, "native", 32, threads)
    if full and format not in NO_INTEGERS:
        built["MatMulNBits in If, accuracy 0"] = builder.rewritten(format, "stock", 32, threads)
    if format in ("int8", "int4"):
        built["QMoE"] = builder.fused(format, threads)
    if llama_cpp and format in llama_cpp_layer.NAMES:
        built[f"{OTHER_PRODUCT} {llama_cpp_layer.NAMES[format]}"] = builder.llama_cpp(llama_cpp, format, threads)
    if format in FLOATS:
        built["torch grouped_mm"] = builder.grouped_mm(format, threads)
    return built


def check(built: dict[str, Run], inputs: Batch) -> None:
    """
    Raises:
        AssertionError: a variant's result differs.
    """
    expected = built[OURS](inputs)
    for name, run in built.items():
        error = np.linalg.norm(run(inputs) - expected) / np.linalg.norm(expected)
        assert error < 0.02, f"{name} differs from {OURS} by {error:.3f}"


def timed(
    built: dict[str, Run], routed: list[list[Batch]], probe: Probe, threads: int, seconds: float
) -> tuple[list[dict[str, float]], Machine]:
    """Median seconds of each variant for each of the ``routed`` batches, and the machine's ceilings meanwhile. All run in
    turn."""
    times: list[dict[str, list[float]]] = [{name: [] for name in built} for _ in routed]
    machines = []
    if len(routed[0][0].x) <= FEW:  # in a long run, the time to map or read the weights does not matter
        for inputs, run in itertools.product(itertools.chain(*routed), built.values()):
            run(inputs)
    start = time.perf_counter()
    for round in range(MAX_ROUNDS):
        if round >= MIN_ROUNDS and time.perf_counter() - start > seconds * len(routed):
            break
        machines.append(probe.machine(threads))
        for batches, taken in zip(routed, times, strict=True):
            inputs = batches[round % len(batches)]
            others = min(batches, key=lambda other: len(np.intersect1d(other.ids, inputs.ids)))
            for name, run in built.items():
                if len(inputs.x) <= FEW:
                    run(others)
                begin = time.perf_counter()
                run(inputs)
                taken[name].append(time.perf_counter() - begin)
            time.sleep(REST)
    return [{name: median(values) for name, values in taken.items()} for taken in times], Machine.of(machines, median)


def work(shape: Shape, format: str, batches: list[Batch]) -> tuple[float, dict[str, float]]:
    """For a median batch: bytes of the weights that it touches, and multiply-adds, by the peak that limits them."""
    formats = formats_of(shape, format)
    touched, macs = [], []
    kinds: dict[Format, str] = {"fp32": "fp32", "fp16": "fp32", "bf16": "bf16", "fp8": "fp32", "int8": "int8"}
    kinds |= dict.fromkeys(("int4", "mxfp4", "int3", "int2"), "int4")
    for _, ids, _, _ in batches:
        load = np.bincount(ids.reshape(-1), minlength=shape.experts)
        touched.append(sum(shape.geometry.expert_bytes(f) for f, n in zip(formats, load, strict=True) if n))
        by_kind = dict.fromkeys(kinds.values(), 0.0)
        for f, n in zip(formats, load, strict=True):
            by_kind[kinds[f]] += float(n) * 3 * shape.hidden * shape.intermediate
        macs.append(by_kind)
    return median(touched), {kind: median(m[kind] for m in macs) for kind in macs[0]}


def measured(
    cells: list[Cell], probe: Probe, llama_cpp: ctypes.CDLL | None, full: bool, seconds: float
) -> Iterator[tuple[list[Row], Machine]]:
    """The rows of one cell after the other, ours first, and the machine's ceilings meanwhile."""
    for shape, same_shape in itertools.groupby(cells, lambda cell: cell.shape):
        with tempfile.TemporaryDirectory() as folder:
            builder = Builder(shape, Path(folder))
            for (format, threads), same in itertools.groupby(same_shape, lambda cell: (cell.format, cell.threads)):
                built = variants(builder, format, threads, llama_cpp, full)
                for _, routed in itertools.groupby(same, lambda cell: cell.tokens):
                    yield from rows_of(list(routed), built, probe, seconds)
                built.clear()  # before the next are built


def rows_of(cells: list[Cell], built: dict[str, Run], probe: Probe, seconds: float) -> Iterator[tuple[list[Row], Machine]]:
    """The rows of each of the cells, which differ only in routing and are measured in turn, and the machine's ceilings
    meanwhile."""
    count = BATCHES if cells[0].tokens <= FEW else 2
    routed = [[batch(cell.shape, cell.tokens, cell.routing, seed) for seed in range(count)] for cell in cells]
    for batches in routed:
        check(built, batches[0])
    times, machine = timed(built, routed, probe, cells[0].threads, seconds)
    for cell, batches, medians in zip(cells, routed, times, strict=True):
        touched, macs = work(cell.shape, cell.format, batches)
        bound = max(touched / machine.bandwidth, sum(n / machine.peaks[kind] for kind, n in macs.items()))
        rows = [
            {
                "shape": cell.shape.name,
                "tokens": cell.tokens,
                "format": cell.format,
                "threads": cell.threads,
                "routing": cell.routing,
                "variant": variant,
                "ms": round(taken * 1e3, 4),
                "gbytes_per_s": round(touched / taken / 1e9, 2),
                "gflops": round(2 * sum(macs.values()) / taken / 1e9, 1),
                "roofline": round(bound / taken, 3),
            }
            for variant, taken in medians.items()
        ]
        yield rows, machine


def report(cell: list[Row]) -> None:
    """Print one line: our time, and each other variant's time divided by ours."""
    ours, *others = cell
    head = f"{ours['shape']:19} {ours['format']:5} T={ours['tokens']:<5} {ours['threads']} threads {ours['routing']:8}"
    speeds = (
        f"{ours['ms']:9.3f} ms {ours['gbytes_per_s']:6.1f} GB/s {ours['gflops']:6.1f} GFLOP/s roofline {ours['roofline']:.2f}"
    )
    ratios = ", ".join(f"{row['variant']} {row['ms'] / ours['ms']:.2f}x" for row in others)
    print(f"{head} {speeds} | {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape, uniform routing, 1, 16 and 256 tokens")
    parser.add_argument("--full", action="store_true", help="every cell and variant: hours, and 24 GB of memory or more")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    help = "the folder that llama_cpp/build.py built in, default: %(default)s"
    parser.add_argument("--llama-cpp", type=Path, default=Path(__file__).parents[1] / "build" / "llama_cpp", help=help)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="seconds per cell, default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.routings = names[:1], (1, 16, 256), ("uniform",)
    shapes = [shape for shape in SHAPES if shape.name in args.shapes]
    product = itertools.product(shapes, args.formats, args.threads, args.tokens, args.routings)
    cells = [cell for cell in itertools.starmap(Cell, product) if args.full or cell.chosen]
    if not cells:
        sys.exit("none of these cells is measured without --full")
    llama_cpp = llama_cpp_layer.library(args.llama_cpp)
    if not llama_cpp:
        print(f"llama.cpp is skipped, since it is not in {args.llama_cpp}; benchmarks/llama_cpp/build.py builds it")
    found: list[Row] = []
    machines: dict[int, list[Machine]] = {threads: [] for threads in args.threads}
    start = time.perf_counter()
    try:
        for rows, machine in measured(cells, Probe(), llama_cpp, args.full, args.seconds):
            report(rows)
            found += rows
            machines[rows[0]["threads"]].append(machine)
            if args.output:
                write(args.output, found, machines)
    except KeyboardInterrupt:
        print("interrupted")
    print(f"{len(found)} rows of {len(cells)} cells after {(time.perf_counter() - start) / 60:.1f} minutes")
    for threads, several in machines.items():
        if several:
            print(f"{threads} threads at best: {Machine.of(several, max)}")
    print(*summary(found), sep="\n")


def write(output: Path, rows: list[Row], machines: dict[int, list[Machine]]) -> None:
    """Write ``rows``, with the processor and the versions they were measured with, in place of the rows of the same cells.

    ``machines``: by number of threads, the measurements of the machine's ceilings.
    """
    before = json.loads(output.read_text()) if output.is_file() else {"machines": {}, "rows": []}
    here = processor()
    best = {str(threads): Machine.of(several, max) for threads, several in machines.items() if several}
    ceilings = before["machines"].get(here, {}).get("threads", {}) | {
        threads: {"gbytes_per_s": round(machine.bandwidth / 1e9, 2)}
        | {f"{kind}_gflops": round(2 * peak / 1e9, 1) for kind, peak in machine.peaks.items()}
        for threads, machine in best.items()
    }
    known = before["machines"] | {here: {"load_average": round(os.getloadavg()[2], 1), "threads": ceilings}}
    origin = {"processor": here} | provenance("onnxruntime", "numpy")
    new = [row | origin for row in rows]
    cells = {tuple(row[key] for key in CELL) for row in new}
    kept = [row for row in before["rows"] if row["processor"] != here or tuple(row[key] for key in CELL) not in cells]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machines": known, "rows": kept + new}, indent=1) + "\n")


if __name__ == "__main__":
    main()
