"""What a slot with rows costs a rank of one core, for ``cpu`` in planning/targets.py.

A layer with native kernels computes 16 rows in 4, 8 or 16 of its slots, one thread, fp32 activations (the default). The weights
are not in the processor's caches before a step, as if the model were larger than the caches. ``microseconds_of_a_slot`` is the
slope of the median time over the number of slots. The constants are the least-squares fit of

    slot_seconds + max(bytes / bytes_per_second, weights / weights_per_second)

to all rows, with the bytes per second of planning/targets.py.

    python benchmarks/slots.py -o benchmarks/results/slots.json
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from moe_variants import Batch, Builder, Run, Shape
from provenance import processor, provenance

FORMATS = ("fp32", "bf16", "int8", "int4")
SHAPES = ((256, 128), (192, 256), (512, 256), (1024, 256))  # hidden and intermediate
EXPERTS, ROWS, VISITED = 16, 16, (4, 8, 16)
CACHES = 1 << 26  # bytes that are read before each step


def slope(run: Run, hidden: int, rounds: int) -> tuple[float, float]:
    """Seconds that one more slot with rows takes, and those of a step with none, extrapolated."""
    x = np.random.default_rng(0).standard_normal((ROWS, hidden), np.float32)
    gates, others = np.ones((ROWS, 1), np.float32), np.ones(CACHES, np.uint8)
    took: dict[int, list[float]] = {visited: [] for visited in VISITED}
    for number, visited in itertools.product(range(rounds), VISITED):
        ids = ((np.arange(ROWS) % visited + number * visited) % EXPERTS)[:, None].astype(np.int64)
        batch = Batch(x, ids, gates, gates)
        others.max()
        start = time.perf_counter()
        run(batch)
        if number:  # the first step reads the weights
            took[visited].append(time.perf_counter() - start)
    of_a_slot, rest = np.polyfit(VISITED, [median(took[visited]) for visited in VISITED], 1)
    return float(of_a_slot), float(rest)


def measured(rounds: int) -> list[dict[str, Any]]:
    from rq_compile.planning.targets import TARGETS

    rows = []
    for hidden, intermediate in SHAPES:
        shape = Shape("slots", hidden, intermediate, EXPERTS, 1)
        with tempfile.TemporaryDirectory() as folder:
            builder = Builder(shape, Path(folder))
            for format in FORMATS:
                of_a_slot, rest = slope(builder.rewritten(format, "native", 32, 1), hidden, rounds)
                size = shape.geometry.expert_bytes(format)  # type: ignore[arg-type]
                row = {
                    "hidden": hidden,
                    "intermediate": intermediate,
                    "format": format,
                    "weights": 3 * hidden * intermediate,
                    "bytes": size,
                    "microseconds_of_a_slot": round(1e6 * of_a_slot, 2),
                    "microseconds_of_its_bytes": round(1e6 * size / TARGETS["cpu"].bytes_per_second, 2),
                    "microseconds_beside_slots": round(1e6 * rest, 1),
                }
                print(row, flush=True)
                rows.append({**row, "processor": processor(), **provenance("onnxruntime", "numpy")})
    return rows


def fit(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """``slot_seconds`` and ``weights_per_second`` with the least sum of squared relative errors."""
    weights, reading, took = (
        np.array([row[name] for row in rows], np.float64)
        for name in ("weights", "microseconds_of_its_bytes", "microseconds_of_a_slot")
    )
    grid = itertools.product(np.arange(0, 6, 0.1), np.arange(8e9, 60e9, 0.5e9))

    def error(fixed: float, rate: float) -> float:
        return float((((fixed + np.maximum(reading, 1e6 * weights / rate)) / took - 1) ** 2).sum())

    fixed, rate = min(grid, key=lambda constants: error(*constants))
    return fixed / 1e6, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="steps of each number of slots")
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = measured(arguments.rounds)
    fixed, rate = fit(rows)
    print(f"slot_seconds {fixed:.2g}, weights_per_second {rate:.3g}")
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
