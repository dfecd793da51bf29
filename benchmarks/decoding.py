"""How fast are quantized weights decoded, in stored bytes per second?

Matrices of one expert, 2048 x 1024, in files that the system holds in memory (/dev/shm if there is one), are read, unpacked and
scaled to fp32, matrix after matrix, on one thread and on two. For comparison, bf16 is only read.

    python benchmarks/decoding.py

The rows are written to benchmarks/results/decoding.json.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from provenance import processor, provenance
from rich.console import Console
from safetensors.torch import save_file

from rq_compile.checkpoint.safetensors_file import tensors_of
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.checkpoint.storage.weight import Weight
from rq_compile.checkpoint.storage.weights import weights_of
from rq_compile.cli.tables import table

ROWS, COLUMNS = 2048, 1024
COLUMNS_SHOWN = ("format", "bits_per_weight", "gb_per_s_one_thread", "gb_per_s_two_threads", "weights_per_s_two_threads")
GENERATOR = torch.Generator().manual_seed(0)
Tensors = dict[str, torch.Tensor]


def bytes_(*shape: int, below: int = 255) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=GENERATOR, dtype=torch.uint8)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=GENERATOR, dtype=torch.int64).to(torch.int32)


def e4m3(*shape: int) -> torch.Tensor:
    return bytes_(*shape, below=0x7F).view(torch.float8_e4m3fn)


def floats(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=GENERATOR)


def pack_quantized(bits: int, group: int, zeros: bool = False) -> Tensors:
    tensors = {"weight_packed": words(ROWS, COLUMNS * bits // 32), "weight_scale": floats(ROWS, COLUMNS // group).bfloat16()}
    tensors["weight_shape"] = torch.tensor([ROWS, COLUMNS])
    return tensors | ({"weight_zero_point": words(ROWS * bits // 32, COLUMNS // group)} if zeros else {})


def gptq(order: bool) -> Tensors:
    groups = torch.arange(COLUMNS, dtype=torch.int32) // 128
    return {
        "qweight": words(COLUMNS // 8, ROWS),
        "qzeros": words(COLUMNS // 128, ROWS // 8),
        "scales": floats(COLUMNS // 128, ROWS).half(),
        "g_idx": groups.flip(0) if order else groups,
    }


CASES: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "bf16": ({"weight": floats(ROWS, COLUMNS).bfloat16()}, {}),
    "FP8, blocks of 128 x 128": ({"weight": e4m3(ROWS, COLUMNS), "weight_scale_inv": floats(ROWS // 128, COLUMNS // 128)}, {}),
    "mxfp8": ({"weight": e4m3(ROWS, COLUMNS), "weight_scale_inv": bytes_(ROWS, COLUMNS // 32, below=130)}, {}),
    "FP4 experts": ({"weight": bytes_(ROWS, COLUMNS // 2).view(torch.int8), "scale": bytes_(ROWS, COLUMNS // 32, below=130)}, {}),
    "MXFP4 (GPT-OSS)": (
        {"w_blocks": bytes_(1, ROWS, COLUMNS // 32, 16), "w_scales": bytes_(1, ROWS, COLUMNS // 32, below=130)},
        {},
    ),
    "NVFP4": (
        {"weight": bytes_(ROWS, COLUMNS // 2), "weight_scale": e4m3(ROWS, COLUMNS // 16), "weight_scale_2": floats(1)},
        {},
    ),
    "pack-quantized, 4 bits, groups of 32": (pack_quantized(4, 32), {}),
    "pack-quantized, 4 bits, groups of 128, zero points": (pack_quantized(4, 128, zeros=True), {}),
    "pack-quantized, 8 bits, groups of 128": (pack_quantized(8, 128), {}),
    "GPTQ, 4 bits, groups of 128": (gptq(order=False), {"group_size": 128}),
    "GPTQ, 4 bits, activation order": (gptq(order=True), {"group_size": 128}),
    "AWQ, groups of 128": (
        {
            "qweight": words(COLUMNS, ROWS // 8),
            "qzeros": words(COLUMNS // 128, ROWS // 8),
            "scales": floats(COLUMNS // 128, ROWS).half(),
        },
        {"group_size": 128},
    ),
}


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)


def row(name: str, weight: Weight, matrices: int, repeats: int) -> dict[str, Any]:
    everything = slice(0, weight.matrix_shape[0])

    def decode(_: int) -> np.ndarray:
        return weight.decode(everything)

    with ThreadPoolExecutor(2) as pool:
        one = seconds(lambda: [decode(number) for number in range(matrices)], repeats)
        two = seconds(lambda: list(pool.map(decode, range(matrices))), repeats)
    size = matrices * weight.bytes / 1e9
    return {
        "format": name,
        "bits_per_weight": round(8 * weight.bytes / (ROWS * COLUMNS), 3),
        "gb_per_s_one_thread": round(size / one, 3),
        "gb_per_s_two_threads": round(size / two, 3),
        "weights_per_s_two_threads": round(matrices * ROWS * COLUMNS / two / 1e9, 3),
    }


def rows(matrices: int, repeats: int) -> list[dict[str, Any]]:
    found = []
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    origin = {"processor": processor()} | provenance("numpy")
    for name, (parts, settings) in CASES.items():
        with tempfile.TemporaryDirectory(dir=place) as folder:
            file = Path(folder) / "model.safetensors"
            save_file({f"m.{part}": tensor for part, tensor in parts.items()}, file)
            (weight,) = weights_of(tensors_of(file), Stated(settings, file)).values()
            found.append(row(name, weight, matrices, repeats) | origin)
            print(found[-1], file=sys.stderr, flush=True)
    return found


def show(found: list[dict[str, Any]], console: Console) -> None:
    made = table("decoding, GB/s of stored bytes", "format", "bits", "one thread", "two threads", "10^9 weights/s, two threads")
    for one in found:
        made.add_row(*(str(one[column]) for column in COLUMNS_SHOWN))
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "decoding.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(arguments.matrices, arguments.repeats)
    show(found, Console(width=140))
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
