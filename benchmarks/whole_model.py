"""Plans for the bytes of a whole engine against uniform formats at equal bytes: KL divergence and perplexity.

For every rival, which stores all experts in one format and all non-expert weights in one, the joint plan gets the bytes of the
rival's weights file (``plan --engine-bytes``). Rivals round as the joint plan does (GPTQ), or, with ``--dense-format``, to the
nearest. Measured on held-out text of the calibration's kinds, with fp32 activations.

    python benchmarks/whole_model.py olmoe qwen2-moe

With ``--modules``, each non-expert module alone, and all experts of each layer alone, are stored in int4: the measured KL
divergence over the predicted error shows how near the unit of the errors is to nats.

The rows are written to benchmarks/results/whole_model.json, or whole_model_modules.json.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

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
from rq_compile.lowerings import Native
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import DenseFormat, Format, PlannedDense
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

UNLIMITED = 2**50


class Bench:
    """One sample model: its calibration, its graph, and the engines made of them."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        self.model = Model.open(ROOT / "samples" / name)
        texts = {kind: (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
        self.calibration, tensors = calibrate(
            self.model, texts, batch_size=8, sequence_length=LENGTH, progress=lambda done, total: None
        )
        self.statistics = Statistics.of(tensors)
        self.exported, self.reference = export_graph(self.model), Remembered(Reference.load(self.model))

    def measured(self, plan: Plan, dense_format: DenseFormat = "stored") -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "model.onnx"
            lowering = Native(dense_format=dense_format)
            manifest = compile_engine(self.model, plan, output, lowering, self.statistics, self.exported)
            engine = Engine.load(output)
            held_out = [windows(engine, kind, self.tokens // len(SAME_KIND)) for kind in SAME_KIND]
            total = evaluate(engine, self.reference, held_out, reference_name=self.name).total
        assert total.perplexity_engine is not None
        assert total.perplexity_reference is not None
        change = total.perplexity_engine / total.perplexity_reference - 1
        return {"bytes": manifest.weights.bytes, "kl": total.kl, "perplexity_change": change, "agreement": total.agreement}


def joint(calibration: Calibration, engine_bytes: int) -> Plan:
    return make_plan(calibration, policy="optimal", memory=None, ranks=1, target="cpu", engine_bytes=engine_bytes)


def uniform(calibration: Calibration, experts: Format, modules: PlannedDense) -> Plan:
    """All experts in one format, and all non-expert modules in one."""
    slots = make_plan(calibration, policy="uniform", memory=1.0, ranks=1, target="cpu", format=experts)
    dense = [module.model_copy(update={"format": modules}) for module in joint(calibration, UNLIMITED).dense]
    return slots.model_copy(update={"dense": dense})


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    calibration = bench.calibration
    experts = make_plan(calibration, policy="uniform", memory=1.0, ranks=1, target="cpu", format="int4")
    rivals: dict[str, tuple[Plan, DenseFormat]] = {
        "everything in int8": (uniform(calibration, "int8", "int8"), "stored"),
        "experts int4, the rest as stored": (uniform(calibration, "int4", "stored"), "stored"),
        "experts int4, the rest in int8": (uniform(calibration, "int4", "int8"), "stored"),
        "experts int4, --dense-format int4": (experts, "int4"),
        "everything in int4": (uniform(calibration, "int4", "int4"), "stored"),
    }
    for rival, (plan, dense_format) in rivals.items():
        found = bench.measured(plan, dense_format)
        yield {"model": bench.name, "tokens": bench.tokens, "rival": rival, "plan": "rival", **found}
        # The smallest engine is everything in int4, for which the joint plan has no choice.
        if rival != "everything in int4":
            best = joint(calibration, found["bytes"] + 4096)
            assert best.optimality is not None
            predicted = {"predicted": best.optimality.objective, "bound": best.optimality.bound}
            yield {
                "model": bench.name,
                "tokens": bench.tokens,
                "rival": rival,
                "plan": "joint",
                **bench.measured(best),
                **predicted,
            }


def module_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    whole = joint(bench.calibration, UNLIMITED)
    for module in whole.dense:
        dense = [one.model_copy(update={"format": "int4" if one.name == module.name else "stored"}) for one in whole.dense]
        known = next(one for one in bench.calibration.dense if one.name == module.name)
        found = bench.measured(whole.model_copy(update={"dense": dense}))
        yield {
            "model": bench.name,
            "kind": module.kind,
            "module": module.name,
            "predicted": known.relative_error("int4"),
            **found,
        }
    for place, layer in enumerate(whole.layers):
        slots = [slot.model_copy(update={"format": "int4"}) for slot in layer.slots]
        layers = [one.model_copy(update={"slots": slots}) if one is layer else one for one in whole.layers]
        measured = bench.calibration.layers[place]
        predicted = sum(measured.error["int4"]) * (measured.stream_share or 0)
        found = bench.measured(whole.model_copy(update={"layers": layers}))
        yield {"model": bench.name, "kind": "experts", "module": layer.name, "predicted": predicted, **found}


def show(found: list[dict[str, Any]], console: Console) -> None:
    made = table("equal bytes", "model", "rival", "plan", "MB", "KL", "perplexity", "agreement")
    for row in found:
        figures = (f"{row['bytes'] / 1e6:.3f}", f"{row['kl']:.2e}", f"{100 * row['perplexity_change']:+.2f} %")
        made.add_row(row["model"], row["rival"], row["plan"], *figures, f"{100 * row['agreement']:.2f} %")
    console.print(made)


def show_modules(found: list[dict[str, Any]], console: Console) -> None:
    made = table("alone in int4", "model", "kind", "module", "predicted", "KL", "KL / predicted")
    for row in found:
        figures = (f"{row['predicted']:.2e}", f"{row['kl']:.2e}", f"{row['kl'] / row['predicted']:.2f}")
        made.add_row(row["model"], row["kind"], row["module"], *figures)
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["olmoe"], help="folders of samples/")
    parser.add_argument("--tokens", type=int, default=4608, help="held-out tokens")
    parser.add_argument("--modules", action="store_true", help="measure modules alone")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    name = "whole_model_modules.json" if arguments.modules else "whole_model.json"
    output = arguments.output or ROOT / "benchmarks" / "results" / name
    found: list[dict[str, Any]] = []
    for model in arguments.models:
        bench = Bench(model, arguments.tokens)
        for row in (module_rows if arguments.modules else rows)(bench):
            found.append(row)
            write_rows(output, found)
    (show_modules if arguments.modules else show)(found, Console(width=140))


if __name__ == "__main__":
    main()
