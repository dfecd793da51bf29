"""The rates of ``rq_compile/estimates.py`` on this machine, per core, compared with those that it assumes.

    python benchmarks/estimates.py [-o benchmarks/results/estimates.json]

CPU time on one thread is measured, so that other load on the machine has as little effect as possible.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent

import numpy as np
import torch
from provenance import write_rows

from rq_compile.architectures.model import Model
from rq_compile.estimates import RATES
from rq_compile.export.export import export_graph
from rq_compile.quantization.quantizer import quantize
from rq_compile.quantization.second_moment import SecondMoment


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    begun = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - begun) / repeats


def rates() -> dict[str, float]:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1024, 2048), dtype=np.float32)
    inputs = rng.standard_normal((4096, 2048), dtype=np.float32)
    moment = SecondMoment(inputs.T @ inputs / len(inputs))
    quantize(weights, "int4", moment)  # the moment is factored only once
    tokens, matrix = torch.randn(512, 2048), torch.randn(2048, 2048)
    checkpoint = Model.open(ROOT / "samples" / "olmoe")
    stored = sum(tensor.bytes for tensor in checkpoint.checkpoint.weights())
    return {
        "flops": 2 * 512 * 2048**2 / cpu_seconds(lambda: tokens @ matrix, 10),
        "gptq": weights.size / cpu_seconds(lambda: quantize(weights, "int4", moment)),
        "nearest": weights.size / cpu_seconds(lambda: quantize(weights, "int4"), 5),
        "read": stored / cpu_seconds(lambda: [checkpoint.read(name) for name in checkpoint.names], 5),
        "export": cpu_seconds(lambda: export_graph(checkpoint)) / len(checkpoint.layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"rate": name, "measured": float(f"{value:.3g}"), "assumed": getattr(RATES, name)} for name, value in rates().items()]
    print(f"{'rate':10}{'measured':>12}{'assumed':>12}")
    for row in rows:
        print(f"{row['rate']:10}{row['measured']:12.3g}{row['assumed']:12.3g}")
    if arguments.output:
        write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
