"""What does storing experts in a format cost? The formats that plans may use, and some that were not adopted: fp8, 3 and 2 bits.

For every up projection W, stored as W', and the calibration's second moment M of its inputs: tr((W' - W) M (W' - W)^T) divided by
tr(W M W^T), which is the squared error of the outputs relative to the outputs. The experts of a layer are taken together, then
the mean over the layers. ``bits`` of a weight include its share of a scale of 32 bits.

    python benchmarks/formats.py

The rows are written to benchmarks/results/formats.json.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

ROOT = Path(__file__).parents[1]

from balance import LENGTH, SAME_KIND
from provenance import write_rows

from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.statistics import Statistics
from rq_compile.cli.tables import table
from rq_compile.quantization.formats import BLOCKS, SCALE_BYTES, SLOT_FORMATS, Block, block_size
from rq_compile.quantization.quantizer import stored
from rq_compile.quantization.second_moment import SecondMoment

MODELS = ("olmoe", "qwen2-moe", "top1", "deepseek-v2")
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FEW_BITS = (3, 2)


def candidates(weights: np.ndarray, moment: SecondMoment, block: Block) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """Format, rounding method, bits per weight without its scale, and the resulting values of ``weights``."""
    for format in ("int8", "int4"):
        yield format, "gptq", SLOT_FORMATS[format].bits, stored(weights, format, moment, block)
        yield format, "nearest", SLOT_FORMATS[format].bits, stored(weights, format, None, block)
    blocks = weights.astype(np.float32).reshape(len(weights), -1, block_size(weights.shape[1], block))
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scales = np.where(largest == 0, np.float32(1), largest)
    fp8 = scales / np.float32(ml_dtypes.finfo(FP8).max)
    yield "fp8_e4m3", "nearest", 8, ((blocks / fp8).astype(FP8).astype(np.float32) * fp8).reshape(weights.shape)
    for bits in FEW_BITS:
        # As in int4: the scale's sign puts the largest weight on the side that has one value more.
        least = -(2 ** (bits - 1))
        coarse = scales / np.float32(least)
        q = np.clip(np.rint(blocks / coarse), least, -least - 1)
        yield f"int{bits}", "nearest", bits, (q * coarse).reshape(weights.shape)


def rows(name: str) -> Iterator[dict[str, Any]]:
    checkpoint = Model.open(ROOT / "samples" / name)
    # The statistics do not depend on the quantizer and the block that errors are measured for.
    texts = {kind: (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
    statistics = Statistics.of(
        calibrate(checkpoint, texts, batch_size=8, sequence_length=LENGTH, progress=lambda done, total: None)[1]
    )
    assert statistics is not None
    layers = checkpoint.layers
    for block in BLOCKS:
        error: dict[tuple[str, str, float], float] = defaultdict(float)
        for layer in layers:
            moment = statistics.input_moment(layer.name)
            lost: dict[tuple[str, str, float], float] = defaultdict(float)
            outputs = 0.0
            for expert in range(layer.geometry.experts):
                weights = checkpoint.matrix(layer, expert, "up").astype(np.float32)
                outputs += energy(weights, moment)
                for format, rounding, bits, values in candidates(weights, moment, block):
                    held = bits + 8 * SCALE_BYTES / block_size(weights.shape[1], block)
                    lost[format, rounding, held] += energy(values - weights, moment)
            for key, value in lost.items():
                error[key] += value / outputs / len(layers)
        for (format, rounding, held), value in error.items():
            yield {"model": name, "block": block, "format": format, "rounding": rounding, "bits": held, "error": value}


def energy(weights: np.ndarray, moment: SecondMoment) -> float:
    """tr(W M W^T): the mean squared length of ``weights @ x``."""
    return float(np.einsum("rc,rc->", weights @ moment.values, weights))


def show(found: list[dict[str, Any]], console: Console) -> None:
    models = list(dict.fromkeys(str(row["model"]) for row in found))
    made = table("squared error of the up projections, relative to their outputs", "format", "rounding", "block", *models)
    cells: dict[tuple[object, ...], dict[object, str]] = defaultdict(dict)
    for row in found:
        cells[row["format"], row["rounding"], row["block"]][row["model"]] = f"{row['error']:.1e}"
    for kind, by_model in cells.items():
        made.add_row(*map(str, kind), *(by_model[model] for model in models))
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="names of sample checkpoints; default: all")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "formats.json")
    args = parser.parse_args()
    found = [row for name in args.models for row in rows(name)]
    write_rows(args.output, found)
    show(found, Console(width=140))


if __name__ == "__main__":
    main()
