"""How much text is enough? Calibrations of the sample models on growing amounts of text, evaluated on text none of them used.

    python benchmarks/calibration_text.py [--model olmoe]

"tokens/expert": (token, choice) pairs per expert, on average. "int4", "int8": the squared error, on held-out text, of the outputs
of up projections that GPTQ rounded with the calibration's moments, divided by that of rounding to the nearest. "error": the
factor between an expert's measured int4 error per token and that of the largest calibration (the median of the experts that
received 16 tokens or more; 95 % are within the second number). "unmeasured": experts with fewer tokens, whose error is estimated.
"load": the same factor for an expert's share of the tokens.

The rows are written to benchmarks/results/calibration_text.json.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from provenance import processor, provenance

from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate, work_of
from rq_compile.calibration.estimate import MIN_PAIRS
from rq_compile.calibration.recording import record
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.quantization.formats import MEASURED_FORMATS
from rq_compile.quantization.quantizer import stored
from rq_compile.quantization.second_moment import whole_moment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "calibration_text.json"
TEXT = ROOT / "samples" / "text"
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
GIVEN: dict[str, Any] = {"batch_size": 8, "sequence_length": 128}
EVERY = 4  # every fourth expert is evaluated
CERTAIN = 256  # with this many tokens in the largest calibration, an expert's numbers count as a reference


def texts(kind: str, share: float) -> dict[str, str]:
    """The first ``share`` of each text."""
    whole = {file.name: file.read_text() for file in sorted(TEXT.glob(f"*.{kind}.txt")) if "satire" not in file.name}
    return {name: text[: int(len(text) * share)] for name, text in whole.items()}


def held_out(model: Model) -> list[np.ndarray]:
    given = texts("heldout", 0.3)
    work = work_of(model, given, **GIVEN)
    recordings = record(model, model.layers, list(given), work.batches, lambda done: None)
    return [whole_moment(np.asarray(recording.measured()[0])).values.astype(np.float64) for recording in recordings]


def rounding(model: Model, statistics: Statistics, moments: list[np.ndarray]) -> dict[str, float]:
    error: dict[tuple[str, bool], float] = defaultdict(float)
    for layer, moment in zip(model.layers, moments, strict=True):
        for expert in range(0, layer.geometry.experts, EVERY):
            weights = model.expert(layer, expert).up.astype(np.float32)
            for format in MEASURED_FORMATS:
                for by_moment in (True, False):
                    given = statistics.input_moment(layer.name) if by_moment else None
                    change = (stored(weights, format, given) - weights).astype(np.float64)
                    error[format, by_moment] += float(np.einsum("ij,jk,ik->", change, moment, change, optimize=True))
    return {format: round(error[format, True] / error[format, False], 4) for format in MEASURED_FORMATS}


def factors(found: np.ndarray, known: np.ndarray) -> list[float]:
    """Median and 95th percentile of the factors between ``found`` and ``known``."""
    off = np.exp(np.abs(np.log(found / known)))
    return [round(float(np.quantile(off, part)), 3) for part in (0.5, 0.95)]


def per_expert(calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """For all experts: the number of tokens, and the int4 error per token."""
    loads = np.concatenate([np.asarray(layer.load) for layer in calibration.layers])
    errors = np.concatenate([np.asarray(layer.sums.error["int4"]) for layer in calibration.layers if layer.sums])
    return loads, errors / np.maximum(loads, 1)


def rows(name: str) -> Iterator[dict[str, Any]]:
    model = Model.open(ROOT / "samples" / name)
    moments = held_out(model)
    runs = [calibrate(model, texts("calibration", share), **GIVEN, progress=lambda *_: None) for share in SHARES]
    known_loads, known = per_expert(runs[-1][0])
    certain = known_loads >= CERTAIN
    for calibration, tensors in runs:
        statistics = Statistics.of(tensors)
        assert statistics is not None
        layer = calibration.layers[0]
        loads, errors = per_expert(calibration)
        measured = certain & (loads >= MIN_PAIRS)
        yield {
            "model": name,
            "tokens": calibration.tokens,
            "tokens/expert": round(sum(layer.load) / layer.geometry.experts),
            **rounding(model, statistics, moments),
            "error": factors(errors[measured], known[measured]),
            "unmeasured": int((loads < MIN_PAIRS).sum()),
            "load": factors(np.maximum(loads, 0.5)[certain] / calibration.tokens, (known_loads / runs[-1][0].tokens)[certain]),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="*", default=["olmoe", "qwen2-moe", "top1", "deepseek-v2"])
    names = parser.parse_args().model
    kept = [row for row in json.loads(RESULTS.read_text()) if row["model"] not in names] if RESULTS.exists() else []
    origin = {"processor": processor(), **provenance("rq-compile", "torch", "transformers")}
    for name in names:
        for row in rows(name):
            kept.append(row | origin)
            print(row, flush=True)
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
