"""Does the error that a plan predicts tell what it does to the model? Random plans, measured, beside the Wanda-style score.

Every plan stores a random half of each layer's experts in int4 and the others as they are, so all plans take the same bytes and
only the choice of experts differs. Predicted by *measured error*: the sum of the experts' errors in the calibration. By the
*Wanda-style score* of the paper, which quantizes the experts with the highest: minus the sum of the scores. By *load*: the sum of
the loads. Observed, on held-out text: KL divergence to the original and change of perplexity. Spearman's rank correlation.

    python benchmarks/sensitivity.py olmoe --plans 40 --tokens 4608

Rows (a plan each) go to benchmarks/results/sensitivity.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from balance import LENGTH, SAME_KIND, Remembered, windows

from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.cli.tables import table
from rq_compile.evaluation.evaluate import evaluate
from rq_compile.export.export import export_graph
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan, Slot
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

PREDICTORS = ("measured_error", "wanda", "load")


def random_plan(calibration: Calibration, random: np.random.Generator) -> tuple[Plan, dict[str, float]]:
    """The plan, and what each predictor says of it: the larger, the worse."""
    plan = make_plan(calibration, policy="none", memory=1.0, ranks=1, target="cpu")
    layers, predicted = [], dict.fromkeys(PREDICTORS, 0.0)
    for layer_plan, layer in zip(plan.layers, calibration.layers, strict=True):
        experts = layer.geometry.experts
        coarse = set(random.permutation(experts)[: experts // 2].tolist())
        slots = [Slot(expert=e, format="int4" if e in coarse else calibration.dtype) for e in range(experts)]
        layers.append(layer_plan.model_copy(update={"slots": slots}))
        predicted["measured_error"] += sum(layer.error["int4"][e] for e in coarse)
        predicted["wanda"] -= sum(layer.wanda[e] for e in coarse)
        predicted["load"] += sum(layer.load[e] for e in coarse)
    return plan.model_copy(update={"layers": layers}), predicted


def rows(name: str, plans: int, tokens: int, seed: int) -> Iterator[dict[str, object]]:
    checkpoint = Checkpoint.open(ROOT / "samples" / name)
    texts = {kind: (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
    calibration, tensors = calibrate(checkpoint, texts, batch_size=8, sequence_length=LENGTH, progress=lambda done, total: None)
    exported, reference = export_graph(checkpoint), Remembered(Reference.load(checkpoint))
    random = np.random.default_rng(seed)
    for number in range(plans):
        plan, predicted = random_plan(calibration, random)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "model.onnx"
            compile_engine(checkpoint, plan, output, "native", Statistics.of(tensors), exported)
            engine = Engine.load(output)
            held_out = [windows(engine, kind, tokens // len(SAME_KIND)) for kind in SAME_KIND]
            total = evaluate(engine, reference, held_out, reference_name=name).total
        change = total.perplexity_engine / total.perplexity_reference - 1
        yield {"model": name, "plan": number, **predicted, "kl": total.kl, "perplexity_change": change}


def show(found: list[dict[str, object]], console: Console) -> None:
    made = table(f"rank correlation over {len(found)} plans", "predicted by", "with KL", "with change of perplexity")
    for predictor in PREDICTORS:
        given = [row[predictor] for row in found]
        observed = (spearmanr(given, [row[what] for row in found]).statistic for what in ("kl", "perplexity_change"))
        made.add_row(predictor.replace("_", " "), *(f"{value:+.2f}" for value in observed))
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["olmoe"], help="folders of samples/")
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=6144, help="held-out tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "sensitivity.json")
    arguments = parser.parse_args()
    found = []
    for model in arguments.models:
        of_model = list(rows(model, arguments.plans, arguments.tokens, arguments.seed))
        Console().print(f"[bold]{model}[/bold]")
        show(of_model, Console(width=120))
        found += of_model
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
