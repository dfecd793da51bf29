"""Does the predicted error of a plan predict its effect on the model? Random plans, measured, compared with the Wanda-style
score.

Every plan stores a random share of each layer's experts in int4 and leaves the others unchanged. In the first experiment the
share is a half, so that all plans take the same bytes and only the choice of experts differs. In the second, it is drawn between
a tenth and all for each plan, so that changes of perplexity exceed the noise. The predictors are: *measured error*, the sum of
the experts' errors in the calibration; the *Wanda-style score* of the paper, which quantizes the experts with the highest score:
the sum of the differences between the highest score of the layer and each expert's; *load*, the sum of the loads; and the
*number* of experts. Observed, on held-out text: KL divergence to the original and change of perplexity. Reported is Spearman's
rank correlation; if plans differ in the number of experts, also the correlation of the residuals of both after a linear fit to
the number.

    python benchmarks/sensitivity.py olmoe

The rows, one for each plan, are written to benchmarks/results/sensitivity.json.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[1]

from balance import LENGTH, SAME_KIND, Remembered, windows
from provenance import write_rows

from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.cli.tables import table
from rq_compile.evaluation.evaluate import evaluate
from rq_compile.export.export import export_graph
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan, Slot
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

PREDICTORS = ("measured_error", "wanda", "load", "number")


class Experiment(NamedTuple):
    """Number of ``plans``, which store between ``least`` and ``most`` of the experts in int4 and run on ``tokens`` held-out
    tokens."""

    least: float
    most: float
    plans: int
    tokens: int


EXPERIMENTS = {"half of the experts": Experiment(0.5, 0.5, 40, 4608), "a tenth to all": Experiment(0.1, 1.0, 32, 18432)}


def random_plan(calibration: Calibration, share: float, random: np.random.Generator) -> tuple[Plan, dict[str, float]]:
    """The plan, and the value of each predictor for it: the larger, the worse."""
    plan = make_plan(calibration, policy="none", memory=1.0, ranks=1, target="cpu")
    layers, predicted = [], dict.fromkeys(PREDICTORS, 0.0)
    for layer_plan, layer in zip(plan.layers, calibration.layers, strict=True):
        experts = layer.geometry.experts
        coarse = set(random.permutation(experts)[: round(share * experts)].tolist())
        slots = [Slot(expert=e, format="int4" if e in coarse else calibration.dtype) for e in range(experts)]
        layers.append(layer_plan.model_copy(update={"slots": slots}))
        predicted["measured_error"] += sum(layer.error["int4"][e] for e in coarse)
        predicted["wanda"] += sum(max(layer.wanda) - layer.wanda[e] for e in coarse)
        predicted["load"] += sum(layer.load[e] for e in coarse)
        predicted["number"] += len(coarse)
    return plan.model_copy(update={"layers": layers}), predicted


def rows(name: str, experiment: str, seed: int) -> Iterator[dict[str, Any]]:
    least, most, plans, tokens = EXPERIMENTS[experiment]
    checkpoint = Model.open(ROOT / "samples" / name)
    texts = {kind: (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
    calibration, tensors = calibrate(checkpoint, texts, batch_size=8, sequence_length=LENGTH, progress=lambda done, total: None)
    exported, reference = export_graph(checkpoint), Remembered(Reference.load(checkpoint))
    random = np.random.default_rng(seed)
    for number, share in enumerate(np.random.default_rng((seed, 1)).uniform(least, most, plans)):
        plan, predicted = random_plan(calibration, share, random)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "model.onnx"
            compile_engine(checkpoint, plan, output, "native", Statistics.of(tensors), exported)
            engine = Engine.load(output)
            held_out = [windows(engine, kind, tokens // len(SAME_KIND)) for kind in SAME_KIND]
            total = evaluate(engine, reference, held_out, reference_name=name).total
        assert total.perplexity_engine is not None
        assert total.perplexity_reference is not None
        change = total.perplexity_engine / total.perplexity_reference - 1
        observed = {"kl": total.kl, "perplexity_change": change}
        yield {"model": name, "experiment": experiment, "tokens": tokens, "plan": number, **predicted, **observed}


def show(found: list[dict[str, Any]], console: Console) -> None:
    what = f"{found[0]['model']}, {found[0]['experiment']}, {found[0]['tokens']} tokens"
    columns = ("predicted by", "with KL", "of equal number", "with change of perplexity", "of equal number")
    made = table(f"{what}: rank correlation over {len(found)} plans", *columns)
    number = np.array([row["number"] for row in found])
    observed = [np.array([row[name] for row in found]) for name in ("kl", "perplexity_change")]
    for predictor in PREDICTORS:
        given = np.array([row[predictor] for row in found])
        if np.ptp(given) == 0:
            continue
        cells = []
        for values in observed:
            alike = (
                "" if np.ptp(number) == 0 or predictor == "number" else correlation(beyond(number, given), beyond(number, values))
            )
            cells += [correlation(given, values), alike]
        made.add_row(predictor.replace("_", " "), *cells)
    console.print(made)


def correlation(first: np.ndarray, second: np.ndarray) -> str:
    return f"{spearmanr(first, second).statistic:+.2f}"


def beyond(number: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The residuals of ``values`` after a linear fit to ``number``."""
    return values - np.polynomial.Polynomial.fit(number, values, 1)(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["olmoe"], help="folders of samples/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "sensitivity.json")
    arguments = parser.parse_args()
    found = []
    for model, experiment in itertools.product(arguments.models, EXPERIMENTS):
        made = list(rows(model, experiment, arguments.seed))
        show(made, Console(width=120))
        found += made
    write_rows(arguments.output, found)


if __name__ == "__main__":
    main()
