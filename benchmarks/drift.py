"""Drift: how balance and error of a plan decay with the distance between the text that it was made for and the text that it gets.

Each model of samples/ is calibrated on one kind of text at a time, and on all three together. The plans of every calibration are
judged on held-out text of four kinds. *Distance* is the total variation between the loads of the calibration and those of the
held-out text: the share of the pairs that would have to go to another expert, mean over the layers. LIS follows from the loads
that the engine counted, for plans with no hedge, the default hedge and a strong one. KL is measured with an engine of the plan
with the default hedge, and so is that of the plan of all kinds ("all kinds").

    python benchmarks/drift.py                       # all models, about 15 minutes on 2 cores
    python benchmarks/drift.py olmoe --tokens 2048

The rows are written to benchmarks/results/drift.json.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean

import numpy as np
from balance import LENGTH, MODELS, OTHER_KIND, ROOT, SAME_KIND, Remembered, windows
from provenance import processor, provenance
from rich.console import Console
from scipy.stats import spearmanr

from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.cli.tables import table
from rq_compile.evaluation.evaluate import evaluate
from rq_compile.evaluation.windows import Windows
from rq_compile.export.export import export_graph
from rq_compile.planning import metrics
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

HEDGES = {"none": 0.0, "default": 0.0002, "strong": 0.01}
MEMORY = 1.0
Loads = Mapping[str, np.ndarray]  # layer -> rows of each expert


def loads_of(engine: Engine, text: Windows) -> Loads:
    """Rows of each logical expert; ``engine`` has one slot for each."""
    total: dict[str, np.ndarray] = {}
    for ids in text.ids:
        for layer, rows in engine.loads(np.array([ids])).items():
            total[layer] = total.get(layer, 0) + np.asarray(rows)
    return total


def distance(calibration: Calibration, loads: Loads) -> float:
    """Total variation between two distributions of the pairs over the experts, mean over the layers."""
    shares = [
        (np.array(layer.load) / sum(layer.load), loads[layer.name] / loads[layer.name].sum()) for layer in calibration.layers
    ]
    return mean(float(np.abs(expected - found).sum() / 2) for expected, found in shares)


def lis(plan: Plan, loads: Loads) -> float:
    found = []
    for layer in plan.layers:
        rows = metrics.slot_loads(loads[layer.name], [slot.expert for slot in layer.slots])
        found.append(float(metrics.lis(rows, layer.geometry.experts)))
    return mean(found)


def rows_of_model(name: str, tokens: int, note: Console) -> Iterator[dict[str, object]]:
    checkpoint = Model.open(ROOT / "samples" / name)
    kinds = {kind: (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
    exported, reference = export_graph(checkpoint), Remembered(Reference.load(checkpoint))
    held_out: dict[str, tuple[Windows, Loads]] = {}
    for calibrated_on in (*SAME_KIND, "all kinds"):
        note.print(f"{name}: plans from {calibrated_on}")
        texts = kinds if calibrated_on == "all kinds" else {calibrated_on: kinds[calibrated_on]}
        calibration, tensors = calibrate(
            checkpoint, texts, batch_size=8, sequence_length=LENGTH, progress=lambda done, total: None
        )
        statistics = Statistics.of(tensors)
        plans = {
            hedge: make_plan(calibration, policy="optimal", memory=MEMORY, ranks=1, target="batched", hedge=value)
            for hedge, value in HEDGES.items()
        }
        with tempfile.TemporaryDirectory() as folder:
            if not held_out:
                none = make_plan(calibration, policy="none", memory=1.0, ranks=1, target="cpu")
                compile_engine(checkpoint, none, Path(folder) / "none.onnx", "native", statistics, exported)
                unplanned = Engine.load(Path(folder) / "none.onnx")
                for kind in (*SAME_KIND, *OTHER_KIND):
                    text = windows(unplanned, kind, tokens)
                    held_out[kind] = text, loads_of(unplanned, text)
            compile_engine(checkpoint, plans["default"], Path(folder) / "model.onnx", "native", statistics, exported)
            engine = Engine.load(Path(folder) / "model.onnx")
            for kind, (text, loads) in held_out.items():
                found = evaluate(engine, reference, [text], reference_name=name).total
                yield {
                    "model": name,
                    "calibrated_on": calibrated_on,
                    "judged_on": kind,
                    "tokens": found.tokens,
                    "distance": distance(calibration, loads),
                    "lis_before": lis(none, loads),
                    "lis_after": {hedge: lis(plan, loads) for hedge, plan in plans.items()},
                    "bytes_after": {hedge: plan.bytes_after / plan.bytes_before for hedge, plan in plans.items()},
                    "predicted_error": {
                        hedge: mean(layer.predicted.error for layer in plan.layers) for hedge, plan in plans.items()
                    },
                    "kl": found.kl,
                    "top1_agreement": found.agreement,
                    "processor": processor(),
                } | provenance("onnxruntime", "torch", "transformers")


def show(rows: list[dict], console: Console) -> None:
    made = table(
        "held-out text", "model", "plan made for", "judged on", "distance", "LIS before", *map("hedge {}".format, HEDGES), "KL"
    )
    for row in rows:
        made.add_row(
            row["model"],
            row["calibrated_on"],
            row["judged_on"],
            f"{row['distance']:.3f}",
            f"{row['lis_before']:.2f}",
            *(f"{row['lis_after'][hedge]:.3f}" for hedge in HEDGES),
            f"{row['kl']:.1e}",
        )
    console.print(made)
    for hedge in HEDGES:
        removed = [metrics.excess_removed(row["lis_before"], row["lis_after"][hedge]) for row in rows]
        same = [value for row, value in zip(rows, removed, strict=True) if row["judged_on"] == row["calibrated_on"]]
        other = [
            value
            for row, value in zip(rows, removed, strict=True)
            if row["calibrated_on"] != "all kinds" and row["judged_on"] != row["calibrated_on"]
        ]
        every = [value for row, value in zip(rows, removed, strict=True) if row["calibrated_on"] == "all kinds"]
        correlation = spearmanr([row["distance"] for row in rows], removed).statistic
        error = mean(row["predicted_error"][hedge] for row in rows)
        console.print(
            f"hedge {hedge}: excess removed {100 * mean(same):.1f} % on the calibrated kind, {100 * mean(other):.1f} % on "
            f"others; plans of all kinds {100 * mean(every):.1f} %; rank correlation with the distance {correlation:+.2f}; "
            f"predicted error {error:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS, help="folders of samples/")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens of each kind")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "drift.json")
    arguments = parser.parse_args()
    note = Console(stderr=True)
    rows = [row for model in arguments.models for row in rows_of_model(model, arguments.tokens, note)]
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows, Console(width=170))


if __name__ == "__main__":
    main()
