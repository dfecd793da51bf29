"""Can a model that does not fit into memory be calibrated, planned and compiled under a memory limit, and then run?

The checkpoints have random weights in the shapes of published models (generated_checkpoint.py): OLMoE-1B-7B in full (13.8 GB),
with twice its layers in FP8 (13.8 GB), and with the experts in MXFP4 (7.6 GB); and Mixtral-8x7B with 1 and with 3 of its 32
layers, from which the time for all layers is extrapolated: the two points give the time per layer and the constant time. Every
stage is a command of rq-compile in a separate process. The limit applies to the memory that a process allocates (RLIMIT_DATA: an
allocation beyond it fails): 4 GiB, and 8 GiB for Mixtral, whose layers have 2.6 GiB each. The peak of the resident memory, which
includes mapped files, is listed too. Running has no limit: ONNX Runtime maps the weights privately and writable, so that they
count as allocated, although they stay pages of the file.

For compile, two upper bounds on the same bytes are listed: the disk alone (reading the checkpoint, not from the cache, and
writing as many bytes as the engine has) and the quantizer alone (one layer's experts, held in memory, quantized and laid out on
as many threads). GB/s always counts bytes of the checkpoint. "compile: weights" is compile without the start of Python and the
export.

    python benchmarks/large_model.py --folder /scratch

The rows are written to benchmarks/results/large_model.json. At most 30 GB of disk are needed; with --scale small, a quick trial,
1 GB.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[1]

from generated_checkpoint import (
    MIXTRAL_8X7B,
    OLMOE_1B_7B,
    OLMOE_FP8,
    OLMOE_MXFP4,
    SMALL,
    SMALL_FP8,
    SMALL_MIXTRAL,
    SMALL_MXFP4,
    Model,
    generate,
)
from provenance import write_rows
from rich.console import Console

from rq_compile.architectures.model import Model as Opened
from rq_compile.cli.tables import table
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.rewrite.slot_weights import slot_weights
from rq_compile.rewrite.weights import Piece, stored

Row = dict[str, Any]
TEXT = ROOT / "samples" / "text" / "hacker.calibration.txt"
GIB = 2**30
BLOCK = 1 << 24
SCALES = {
    "full": (
        ("OLMoE-1B-7B", OLMOE_1B_7B, 4 * GIB),
        ("OLMoE in FP8, 32 layers", OLMOE_FP8, 4 * GIB),
        ("OLMoE in MXFP4, 32 layers", OLMOE_MXFP4, 4 * GIB),
        ("Mixtral-8x7B", MIXTRAL_8X7B, 8 * GIB),
    ),
    "small": (
        ("small OLMoE", SMALL, 2 * GIB),
        ("small OLMoE in FP8", SMALL_FP8, 2 * GIB),
        ("small OLMoE in MXFP4", SMALL_MXFP4, 2 * GIB),
        ("small Mixtral", SMALL_MIXTRAL, 2 * GIB),
    ),
}
FEW_LAYERS = (1, 3)


@dataclass(frozen=True)
class Settings:
    folder: Path
    characters: int
    quantizer: str
    memory: float


@dataclass(frozen=True)
class Finished:
    seconds: float
    peak: int
    error: str


def command(*arguments: object, limit: int) -> Finished:
    """``rq-compile`` in a process that may allocate ``limit`` bytes."""
    program = [sys.executable, "-P", "-m", "rq_compile.cli.main", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as error:
        began = perf_counter()
        process = subprocess.Popen(
            program,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=error,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - began
        error.seek(0)
        finished = Finished(seconds, usage.ru_maxrss * 1024, error.read())
    if status:
        raise SystemExit(f"{' '.join(program)} failed:\n{finished.error}")
    return finished


def row(name: str, stage: str, seconds: float, size: int, peak: int | None = None, extrapolated_from: str | None = None) -> Row:
    return {
        "model": name,
        "stage": stage,
        "seconds": round(seconds, 2),
        "gb_per_s": round(size / 1e9 / seconds, 4),
        "peak_rss_gib": None if peak is None else round(peak / GIB, 3),
        "checkpoint_gb": round(size / 1e9, 3),
        "extrapolated_from": extrapolated_from,
    }


def stages(name: str, model: Model, limit: int, settings: Settings) -> Iterator[Row]:
    """Generate, calibrate, plan, compile and run the model. All files are removed afterwards."""
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        files = ("model", "text.txt", "calibration.json", "plan.json", "engine.onnx")
        checkpoint, text, calibration, plan, engine = (Path(folder) / name for name in files)
        began = perf_counter()
        generate(model, checkpoint)
        yield row(name, "generate", perf_counter() - began, model.bytes)
        text.write_text(TEXT.read_text()[: settings.characters])
        for stage, arguments in (
            ("calibrate", ["calibrate", checkpoint, "--text", text, "--quantizer", settings.quantizer, "-o", calibration]),
            ("plan", ["plan", calibration, *(["--memory", settings.memory] if model.storage == "bf16" else []), "-o", plan]),
            ("compile", [checkpoint, "--plan", plan, "-o", engine]),
            ("run 8 tokens", ["generate", engine, "--prompt", "The model", "--max-tokens", 8]),
        ):
            if stage == "calibrate":
                arguments += ["--memory-limit", limit]
            if stage == "compile":
                _forget(checkpoint)
            finished = command(*arguments, limit=resource.RLIM_INFINITY if stage == "run 8 tokens" else limit)
            yield row(name, stage, finished.seconds, model.bytes, finished.peak)
            if stage == "compile":
                (seconds,) = re.findall(r"of weights in ([\d.e+]+) s", finished.error)
                yield row(name, "compile: weights", float(seconds), model.bytes)
                yield row(name, "disk alone", disk_alone(checkpoint, engine.with_suffix(".onnx.data")), model.bytes)
                yield row(name, "quantizer alone", quantizer_alone(checkpoint, plan, model), model.bytes)


def extrapolated(name: str, model: Model, limit: int, settings: Settings) -> Iterator[Row]:
    """Rows for a few layers, and rows extrapolated from them for all layers of the model."""
    few = {
        layers: list(told(stages(f"{name}, {layers} of {model.layers} layers", model.of(layers), limit, settings)))
        for layers in FEW_LAYERS
    }
    less, more = FEW_LAYERS
    for one, other in zip(few[less], few[more], strict=True):
        yield one
        yield other
        layer = (float(other["seconds"]) - float(one["seconds"])) / (more - less)
        if one["stage"] != "run 8 tokens":
            seconds = max(float(other["seconds"]) + layer * (model.layers - more), float(other["seconds"]))
            yield row(name, str(one["stage"]), seconds, model.bytes, extrapolated_from=f"{less} and {more} layers")


def disk_alone(checkpoint: Path, weights: Path) -> float:
    """Seconds to read the checkpoint's files from the disk and to write as many bytes as the engine's weights file has."""
    _forget(checkpoint)
    began = perf_counter()
    for shard in checkpoint.glob("*.safetensors"):
        with shard.open("rb", buffering=0) as file:
            while file.read(BLOCK):
                pass
    left, zeros = weights.stat().st_size, bytes(BLOCK)
    with tempfile.TemporaryFile(dir=weights.parent, buffering=0) as file:
        while left > 0:
            left -= file.write(zeros[: min(left, BLOCK)])
        os.fsync(file.fileno())
    return perf_counter() - began


def quantizer_alone(folder: Path, plan_path: Path, model: Model) -> float:
    """Seconds for all layers, extrapolated from those of the first layer, without reading and writing."""
    checkpoint, plan = Opened.open(folder), read_document(Plan, plan_path)
    layer = checkpoint.layers[0]
    two = [checkpoint.expert(layer, expert) for expert in range(2)]
    pieces = [
        piece
        for projection in ("up", "down")
        for piece in slot_weights(plan.layers[0], projection, lambda _, e: two[e % 2], panels=True).pieces
    ]

    def compute(piece: Piece) -> None:
        for values, weight in zip(piece.values(), piece.weights, strict=True):
            stored(values, weight.dtype)

    began = perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compute, pieces))
    return (perf_counter() - began) * model.layers


def _forget(folder: Path) -> None:
    """Drop the files of ``folder`` from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def told(rows: Iterable[Row]) -> Iterator[Row]:
    """``rows``; each is also printed on stderr as soon as it is available."""
    for one in rows:
        print(f"{one['model']}: {one['stage']}, {one['seconds']} s", file=sys.stderr, flush=True)
        yield one


def show(found: list[Row], console: Console) -> None:
    made = table("large models", "model", "stage", "seconds", "GB/s", "peak RSS, GiB", "extrapolated from")
    for one in found:
        peak = "" if one["peak_rss_gib"] is None else f"{one['peak_rss_gib']:.2f}"
        made.add_row(
            str(one["model"]), str(one["stage"]), f"{one['seconds']:.1f}", f"{one['gb_per_s']:.3f}", peak,
            str(one["extrapolated_from"] or "measured"),
        )  # fmt: skip
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder with enough free space")
    parser.add_argument("--characters", type=int, default=4000, help="characters of text to calibrate with")
    parser.add_argument("--quantizer", choices=("gptq", "nearest"), default="nearest", help="gptq takes hours")
    parser.add_argument("--memory", type=float, default=0.6, help="the plan's memory budget")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/large_model.json at full scale, else none")
    parser.add_argument("--only", help="the models with this in their name")
    arguments = parser.parse_args()
    settings = Settings(arguments.folder, arguments.characters, arguments.quantizer, arguments.memory)
    *whole, few = SCALES[arguments.scale]
    if arguments.only:
        whole = [one for one in whole if arguments.only in one[0]]
    found = [row for one in whole for row in told(stages(*one, settings))]
    found += [] if arguments.only else extrapolated(*few, settings)
    show(found, Console(width=140))
    output = arguments.output or (ROOT / "benchmarks" / "results" / "large_model.json" if arguments.scale == "full" else None)
    if output:
        write_rows(output, found)


if __name__ == "__main__":
    main()
