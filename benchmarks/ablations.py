"""What a plan's balance depends on: one model's loads on held-out text, under plans that differ in one thing at a time.

1. *calibration size*: plans from the first 1 %, 10 % and 100 % of the calibration text, evaluated on held-out text.
2. *shift*: plans from one kind of text, evaluated on each kind.
3. *batch size and padding*: LIS of batches of lines of unequal length, with padding masked and with padding counted. The paper
   reports that LIS grows with the batch; with padding masked, it falls.
4. *replicas in full precision or not*: plans that may quantize, and plans that may not.
5. *does load predict importance?* The rank correlation, per layer, of an expert's load with its measured error in int4.
6. *tolerance, mixed copies, block*: the benefits and costs of these options of planning and calibration, in compiled engines.

    python benchmarks/ablations.py olmoe

LIS is the mean over the layers. Plans are for target `batched` at memory 1.0, unless a row says otherwise. The rows are written
to benchmarks/results/ablations.json.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import spearmanr
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]

from balance import Remembered, rows_of_plan
from provenance import write_rows

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.cli.tables import table
from rq_compile.export.export import export_graph
from rq_compile.planning.metrics import excess_removed, lis, slot_loads
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import Block
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

KINDS = ("scripture", "hacker", "dictionary", "satire")
CALIBRATED = KINDS[:3]
TOKENS = 12288
# By block: memory, and options of planning.
VARIANTS: dict[Block, list[tuple[float, dict[str, Any]]]] = {
    128: [
        (0.6, {}),
        (0.6, {"tolerance": 0.1}),
        (0.6, {"mixed_copies": True}),
        *((1.0, {"tolerance": tolerance}) for tolerance in (0.01, 0.05, 0.1, 0.2, 0.5)),
        (1.0, {"mixed_copies": True}),
    ],
    32: [(0.6, {}), (1.0, {})],
}
Row = dict[str, Any]


def text(kind: str, part: str) -> str:
    return (ROOT / "samples" / "text" / f"{kind}.{part}.txt").read_text()


def calibrated(checkpoint: Model, texts: dict[str, str]) -> Calibration:
    return calibrate(
        checkpoint, texts, batch_size=8, sequence_length=256, progress=lambda done, total: None, quantizer="nearest"
    )[0]


def planned(calibration: Calibration, memory: float = 1.0, **options: Any) -> Plan:
    return make_plan(calibration, policy="optimal", memory=memory, ranks=1, target="batched", **options)


def held_against(plan: Plan, heldout: Calibration, kinds: tuple[str, ...] = KINDS) -> Row:
    """LIS of the held-out loads, without and with ``plan``."""
    before, after = [], []
    for layer, loads in zip(plan.layers, heldout.layers, strict=True):
        for place, name in enumerate(heldout.texts):
            if name.name in kinds:
                load = np.array(loads.text_loads[place])
                before.append(float(lis(load, layer.geometry.experts)))
                after.append(float(lis(slot_loads(load, [slot.expert for slot in layer.slots]), layer.geometry.experts)))
    return {"lis_before": mean(before), "lis_after": mean(after), "excess_removed": excess_removed(mean(before), mean(after))}


def calibration_size(checkpoint: Model, heldout: Calibration) -> Iterator[Row]:
    for share in (0.01, 0.1, 1.0):
        texts = {kind: text(kind, "calibration") for kind in CALIBRATED}
        plan = planned(calibrated(checkpoint, {kind: whole[: int(share * len(whole))] for kind, whole in texts.items()}))
        for tested in (CALIBRATED, KINDS[3:]):
            yield {"calibration_size": share, "tested_on": " ".join(tested), **held_against(plan, heldout, tested)}


def shift(checkpoint: Model, heldout: Calibration) -> Iterator[Row]:
    for kind in CALIBRATED:
        plan = planned(calibrated(checkpoint, {kind: text(kind, "calibration")}))
        for tested in KINDS:
            yield {"calibrated_on": kind, "tested_on": tested, **held_against(plan, heldout, (tested,))}


def batches_and_padding(checkpoint: Model) -> Iterator[Row]:
    """Batches of lines of the held-out dictionary in their order, so that short and long lines share a batch."""
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    lines = [line for line in text("dictionary", "heldout").splitlines() if len(line) > 20][:1024]
    ids = [tokenizer.encode(line).ids[:128] for line in lines]
    model, layers = load_model(checkpoint), checkpoint.layers
    chosen: dict[str, np.ndarray] = {}
    for layer in layers:
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, inputs, keywords, name=layer.name: chosen.update({name: [*inputs, *keywords.values()][1].numpy()}),
            with_kwargs=True,
        )
    for size in (1, 8, 32, 128):
        scores: dict[str, list[float]] = {"masked": [], "counted": []}
        padded = real = 0
        for start in range(0, min(len(ids), max(64, 4 * size)), size):
            batch = ids[start : start + size]
            width = max(map(len, batch))
            mask = np.array([[1] * len(line) + [0] * (width - len(line)) for line in batch])
            given = torch.tensor([line + [0] * (width - len(line)) for line in batch])
            model(input_ids=given, attention_mask=torch.from_numpy(mask))
            padded, real = padded + mask.size - mask.sum(), real + mask.sum()
            for layer in layers:
                experts = layer.geometry.experts
                for what, rows in (("masked", chosen[layer.name][mask.ravel() == 1]), ("counted", chosen[layer.name])):
                    scores[what].append(float(lis(np.bincount(rows.ravel(), minlength=experts), experts)))
        yield {
            "sequences": size,
            "padding_share": float(padded / (padded + real)),
            "lis_masked": mean(scores["masked"]),
            "lis_padding_counted": mean(scores["counted"]),
        }


def precision_of_replicas(calibration: Calibration, heldout: Calibration) -> Iterator[Row]:
    for formats in (calibration.dtype, f"{calibration.dtype},int8", ""):
        for memory in (1.0, 1.5):
            plan = planned(calibration, memory, formats=formats)
            error = mean(layer.predicted.error or 0.0 for layer in plan.layers)
            yield {"formats": formats or "all", "memory": memory, "error": error, **held_against(plan, heldout)}


def load_and_importance(calibration: Calibration) -> Iterator[Row]:
    for layer in calibration.layers:
        per_token = np.array(layer.error["int4"]) / np.maximum(layer.load, 1)
        yield {
            "layer": layer.index,
            "load_with_error": float(spearmanr(layer.load, layer.error["int4"]).statistic),
            "load_with_error_per_token": float(spearmanr(layer.load, per_token).statistic),
            "load_with_wanda": float(spearmanr(layer.load, layer.wanda).statistic),
        }


def in_engines(checkpoint: Model) -> Iterator[Row]:
    texts = {kind: text(kind, "calibration") for kind in CALIBRATED}
    exported, reference = export_graph(checkpoint), Remembered(Reference.load(checkpoint))
    for block, variants in VARIANTS.items():
        calibration, tensors = calibrate(
            checkpoint, texts, batch_size=8, sequence_length=256, progress=lambda done, total: None, block=block
        )
        for memory, options in variants:
            plan = planned(calibration, memory, **options)
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "model.onnx"
                compile_engine(checkpoint, plan, output, "native", Statistics.of(tensors), exported)
                for row in rows_of_plan(checkpoint.name, plan, Engine.load(output), reference, TOKENS):
                    yield {
                        "memory": memory,
                        "block": block,
                        "tolerance": plan.options["tolerance"],
                        "mixed_copies": plan.options["mixed_copies"],
                        "tested_on": row["text"],
                        "bytes": row["bytes_after"] / row["bytes_before"],
                        "slots": sum(len(layer.slots) for layer in plan.layers),
                        "lis_after": row["lis_after"],
                        "padded_work": mean(layer.predicted.padded_work_after or 0.0 for layer in plan.layers),
                        "error": mean(layer.predicted.error or 0.0 for layer in plan.layers),
                        "kl": row["kl"],
                        "top1_agreement": row["top1_agreement"],
                    }


def show(title: str, rows: list[Row], console: Console) -> None:
    made = table(title, *(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        made.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(made, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="olmoe", help="a folder of samples/")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "ablations.json")
    arguments = parser.parse_args()
    checkpoint = Model.open(ROOT / "samples" / arguments.model)
    heldout = calibrated(checkpoint, {kind: text(kind, "heldout") for kind in KINDS})
    calibration = calibrated(checkpoint, {kind: text(kind, "calibration") for kind in CALIBRATED})
    found = {
        "calibration size": list(calibration_size(checkpoint, heldout)),
        "shift": list(shift(checkpoint, heldout)),
        "batch size and padding, lines of a dictionary": list(batches_and_padding(checkpoint)),
        "precision of replicas": list(precision_of_replicas(calibration, heldout)),
        "load and importance, rank correlation": list(load_and_importance(calibration)),
        "tolerance, mixed copies, block": list(in_engines(checkpoint)),
    }
    for title, rows in found.items():
        show(title, rows, Console(width=130))
    flat = [{"model": arguments.model, "ablation": title, **row} for title, rows in found.items() for row in rows]
    write_rows(arguments.output, flat)


if __name__ == "__main__":
    main()
