"""Can published checkpoints be opened, and what would it take to calibrate and compile them?

Each is generated with the config, the tensor names, shapes and dtypes of the published one, but without weights
(published_checkpoints.py). `inspect`, `calibrate --dry-run`, `plan` and the compiler's `--dry-run` run on it, each in a separate
process. The calibration that the plan uses is made up: its loads are as skewed as those measured for Qwen3.6-35B (Gini 0.65), and
the errors of the formats are those of weights stored in that way. The plan's choices for an expert mean nothing; its bytes are
real. Times and memory of calibrating and compiling are rq-compile's estimates for the machine that `rq_compile/estimates.py`
describes. The CPU times of inspecting and planning are measured.

    python benchmarks/published_models.py

The rows are written to benchmarks/results/published_models.json. 100 MB of disk are needed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

import numpy as np
from provenance import write_rows
from published_checkpoints import PUBLISHED, write
from rich.console import Console

from rq_compile.architectures.model import Model
from rq_compile.calibration.schema import Calibration, CalibrationText, LayerCalibration
from rq_compile.calibration.stored import formats_to_measure, layers_to_measure, lossless_format, stored_layer
from rq_compile.cli.tables import table
from rq_compile.files import write_document
from rq_compile.quantization.formats import FORMATS, SLOT_FORMATS, Format

Row = dict[str, Any]
TEXT = ROOT / "samples" / "text" / "hacker.calibration.txt"
TOKENS = 100_000
SPREAD = 1.32  # of the logarithm of a load: log-normal loads then have a Gini coefficient of 0.65
ROUNDED: tuple[Format, ...] = ("fp32", "fp16", "bf16", "int8", "int4")
# Relative squared change of weights that are rounded to these formats, by how they are stored. 0: kept unchanged.
ERRORS = {
    "plain": (0.0, 0.0, 0.0, 4.2e-5, 1.1e-2),
    "FP8": (0.0, 1e-7, 2.8e-6, 4.4e-5, 7.6e-3),
    "MXFP4": (0.0, 0.0, 0.0, 0.0, 1e-2),
    "NVFP4": (0.0, 0.0, 2.8e-6, 0.0, 9e-3),
}
# Options of the plans; the first is the default.
PLANS: dict[str, tuple[str, ...]] = {
    "gpt-oss-20b": (),
    "Qwen3.6-35B-A3B": ("--memory", "0.3"),
    "Qwen3.6-35B-A3B-FP8": ("--memory", "0.6"),
    "Qwen3.6-35B-A3B-NVFP4": (),
    "DeepSeek-V3": ("--memory", "0.6"),
}
MEMORY = "16G"


def made_up(model: Model) -> Calibration:
    """An invented calibration of ``TOKENS`` tokens."""
    random = np.random.default_rng(0)
    measured, layers = layers_to_measure(model, None), []
    carried = [format for format in formats_to_measure(model, measured) if SLOT_FORMATS[format].only_carried]
    for layer in measured:
        geometry = layer.geometry
        share = random.lognormal(0, SPREAD, geometry.experts)
        load = random.multinomial(TOKENS * geometry.top_k, share / share.sum())
        stored = stored_layer(model, layer)
        kind = str(stored.get("stored_as", ["plain"])[0]).split()[0]
        changes = dict(zip(ROUNDED, ERRORS[kind], strict=True)) | dict.fromkeys(carried, 0.0)
        error = {format: (changes[format] * load / load.sum()).tolist() for format in FORMATS if format in changes}
        layers.append(
            LayerCalibration(
                name=layer.name,
                index=layer.index,
                geometry=geometry,
                **stored,
                load=load.tolist(),
                text_loads=[load.tolist()],
                batch_loads=[load.tolist()],
                wanda=[1.0] * geometry.experts,
                error=error,
            )
        )
    return Calibration(
        tool="benchmarks/published_models.py",
        model=model.name,
        model_type=model.model_type,
        fingerprint=model.fingerprint,
        dtype=lossless_format(model, layers),
        texts=[CalibrationText(name="made up", sha256=hashlib.sha256(b"").hexdigest(), tokens=TOKENS)],
        tokens=TOKENS,
        measured_tokens=TOKENS,
        padding_tokens=0,
        batch_size=8,
        sequence_length=512,
        wanda_fraction=0.5,
        quantizer="nearest",
        statistics=None,
        extra_layers=model.extra_layers,
        layers=layers,
    )


def command(*arguments: object) -> tuple[dict[str, Any], float, int]:
    """The JSON that ``rq-compile`` prints, its CPU seconds and its peak resident memory in bytes."""
    program = [sys.executable, "-P", "-m", "rq_compile.cli.main", *map(str, arguments), "--json"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(program, stdout=out, stderr=error)
        _, status, usage = os.wait4(process.pid, 0)
        for file in (out, error):
            file.seek(0)
        if status:
            raise SystemExit(f"{' '.join(program)} failed:\n{error.read()}")
        return json.loads(out.read()), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def row(name: str, folder: Path) -> Row:
    checkpoint = write(name, folder / name)
    calibration, plan, engine = folder / "calibration.json", folder / "plan.json", folder / "engine.onnx"
    found, opening, peak = command("inspect", checkpoint)
    calibrating, *_ = command(
        *("calibrate", checkpoint, "--text", TEXT, "-o", folder / "c.json", "--dry-run", "--memory-limit", MEMORY)
    )
    write_document(made_up(Model.open(checkpoint)), calibration)
    planned, planning, _ = command("plan", calibration, *PLANS[name], "-o", plan)
    compiling, *_ = command(checkpoint, "--plan", plan, "-o", engine, "--dry-run")
    return {
        "model": name,
        "tensors": sum(len(_header(file)) for file in checkpoint.glob("*.safetensors")),
        "checkpoint_gb": round(found["bytes"] / 1e9, 2),
        "experts_gb": round(found["expert_bytes"] / 1e9, 2),
        "inspect_cpu_seconds": round(opening, 1),
        "inspect_peak_gb": round(peak / 1e9, 2),
        "calibrate_hours": round(calibrating["seconds"] / 3600, 1),
        "calibrate_memory_gb": round(calibrating["memory_bytes"] / 1e9, 1),
        "calibrate_temporary_gb": round(calibrating["temporary_bytes"] / 1e9, 1),
        "plan": " ".join(PLANS[name]) or "default",
        "plan_memory": round(planned["memory"], 4),
        "plan_cpu_seconds": round(planning, 1),
        "engine_gb": round(sum(compiling["outputs"].values()) / 1e9, 1),
        "compile_minutes": round(compiling["seconds"] / 60),
        "compile_memory_gb": round(compiling["memory_bytes"] / 1e9, 1),
    }


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))


def show(rows: list[Row], console: Console) -> None:
    made = table(
        "published models: measured, then estimated",
        *("model", "tensors", "GB", "inspect, CPU s", "calibrate, h", "GB", "plan", "engine, GB", "compile, min", "GB"),
    )
    for one in rows:
        keys = ("model", "tensors", "checkpoint_gb", "inspect_cpu_seconds", "calibrate_hours", "calibrate_memory_gb", "plan")
        made.add_row(*(str(one[key]) for key in (*keys, "engine_gb", "compile_minutes", "compile_memory_gb")))
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="only the models with this in their name")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/published_models.json without --only")
    arguments = parser.parse_args()
    names = [name for name in PUBLISHED if (arguments.only or "") in name]
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in names:
            rows.append(row(name, Path(folder)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows, Console(width=160))
    output = arguments.output or (None if arguments.only else ROOT / "benchmarks" / "results" / "published_models.json")
    if output:
        write_rows(output, rows)


if __name__ == "__main__":
    main()
