"""Plans below four bits, as engines: KL, perplexity and agreement at 2.5, 3, 3.5 and 4.25 bits per expert weight.

Each model of samples/ is calibrated in int8, int4, int3, int2 and constant, and planned by ``optimal`` with all of these formats
and without ``constant``. The plans are compared with *uniform* GPTQ in the same bytes: one format for all experts, in the block
that gives these bytes (``--policy uniform``), or formats that are shared out at random (``--policy random``); the better of the
two counts. All plans are compiled for the CPU, run in ONNX Runtime, and compared with transformers on held-out text of the
calibration's kinds and of another kind. ``few_bits.py`` says which formats were tried.

    python benchmarks/few_bits_engines.py --tokens 1536             # all models, about ten minutes on 2 cores
    python benchmarks/few_bits_engines.py olmoe --tokens 4096

The rows are written to benchmarks/results/few_bits_engines.json, plan by plan. Plans whose rows it has are not run again, and
calibrations stay in ``--folder``, so that an interrupted run goes on.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from balance import LENGTH, MODELS, OTHER_KIND, ROOT, SAME_KIND, Remembered, windows
from provenance import origin
from rich.console import Console

from rq_compile.architectures.model import Model
from rq_compile.calibration.lengths import TOKENS
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.calibration.written import calibrated_into
from rq_compile.cli.tables import table
from rq_compile.evaluation.evaluate import evaluate
from rq_compile.export.export import export_graph
from rq_compile.files import read_document
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import Block, Format
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

SOURCE_BITS = 16.0
# Uniform plans of exactly these bits (in blocks that divide the rows).
UNIFORM: dict[float, tuple[Format, Block]] = {2.5: ("int2", 64), 3.0: ("int2", 32), 3.5: ("int3", 64), 4.25: ("int4", 128)}
ROUNDED: tuple[Format, ...] = ("int8", "int4", "int3", "int2")
Calibrated = tuple[Calibration, Statistics | None]


def calibrated(checkpoint: Model, formats: Sequence[Format], block: Block, folder: Path) -> Calibrated:
    file = folder / f"{checkpoint.path.name}.{block}.{'.'.join(formats)}.json"
    texts = {kind: (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
    options: dict[str, Any] = {"batch_size": 8, "sequence_length": LENGTH, "tokens": TOKENS, "progress": lambda done, total: None}
    if not file.is_file():
        calibrated_into(file, checkpoint, texts, fresh=False, remark=lambda text: None, formats=formats, block=block, **options)
    made = read_document(Calibration, file)
    return made, Statistics.beside(folder, made.statistics) if made.statistics else None


def planned(measured: Calibration, bits: float, policy: str, **options: Any) -> Plan:
    return make_plan(measured, policy=policy, memory=bits / SOURCE_BITS, ranks=1, target="cpu", **options)


def plans_of(
    checkpoint: Model, budgets: Sequence[float], folder: Path, note: Console
) -> Iterator[tuple[float, str, Plan, Statistics | None]]:
    """The budget in bits, the name, the plan, and the statistics that it needs."""
    measured, statistics = calibrated(checkpoint, (*ROUNDED, "constant"), 128, folder)
    for bits in budgets:
        format, block = UNIFORM[bits]
        own, moments = (measured, statistics) if block == 128 else calibrated(checkpoint, (format,), block, folder)
        note.print(f"{checkpoint.name}: calibrated for {bits:g} bits")
        shares = [layer.geometry.expert_bytes(format) / layer.geometry.expert_bytes("bf16") for layer in own.layers]
        least = max(bits, SOURCE_BITS * max(shares))  # short rows have shorter blocks
        yield bits, "uniform", planned(own, least, "uniform", format=format), moments
        yield bits, "random", planned(measured, least, "random"), statistics
        yield bits, "8, 4, 3, 2 bits", planned(measured, least, "optimal", formats=", ".join(ROUNDED)), statistics
        yield bits, "and constant", planned(measured, least, "optimal"), statistics


def rows_of_model(
    name: str, budgets: Sequence[float], tokens: int, folder: Path, known: set[tuple[float, str]], note: Console
) -> Iterator[dict[str, Any]]:
    """``known``: the budgets and names of the plans that are left out."""
    checkpoint = Model.open(ROOT / "samples" / name)
    exported, reference = export_graph(checkpoint), Remembered(Reference.load(checkpoint))
    for budget, label, plan, statistics in plans_of(checkpoint, budgets, folder, note):
        if (budget, label) in known:
            continue
        slots = Counter(slot.format for layer in plan.layers for slot in layer.slots)
        with tempfile.TemporaryDirectory() as name_of_folder:
            output = Path(name_of_folder) / "model.onnx"
            manifest = compile_engine(checkpoint, plan, output, "native", statistics, exported)
            engine = Engine.load(output)
            for text, kinds in (("same kind", SAME_KIND), ("other kind", OTHER_KIND)):
                cut = [windows(engine, kind, tokens // len(kinds)) for kind in kinds]
                total = evaluate(engine, reference, cut, reference_name=name).total
                assert total.perplexity_engine
                assert total.perplexity_reference
                yield {
                    "model": name,
                    "text": text,
                    "budget": budget,
                    "plan": label,
                    "bits": SOURCE_BITS * manifest.expert_bytes / plan.bytes_before,
                    "kl": total.kl,
                    "perplexity": total.perplexity_engine / total.perplexity_reference - 1,
                    "agreement": total.agreement,
                    "formats": dict(slots),
                }
        note.print(f"{name}: {label} at {budget:g} bits")


def show(rows: list[dict[str, Any]], console: Console) -> None:
    models = [name for name in MODELS if any(row["model"] == name for row in rows)]
    found = {(row["text"], row["budget"], row["plan"], row["model"]): row for row in rows}

    def cell(text: str, budget: float, plan: str, model: str) -> str:
        row = found.get((text, budget, plan, model))
        if row is None:
            return ""
        base = min(found[text, budget, other, model]["kl"] for other in ("uniform", "random"))
        ratio = "" if plan in ("uniform", "random") else f" ({row['kl'] / base:.2f})"
        return f"{row['kl']:.1e}{ratio} {100 * row['perplexity']:+.1f} % {100 * row['agreement']:.1f} %"

    for text in dict.fromkeys(row["text"] for row in rows):
        made = table(f"KL (of the better uniform plan's), perplexity, agreement: {text}", "bits", "plan", *models)
        for budget, plan in dict.fromkeys((row["budget"], row["plan"]) for row in rows):
            made.add_row(f"{budget:g}", plan, *(cell(text, budget, plan, model) for model in models))
        console.print(made)
    made = table("constant experts", "bits", *models)
    for budget in dict.fromkeys(row["budget"] for row in rows):
        held = [found.get(("same kind", budget, "and constant", model), {"formats": {}})["formats"] for model in models]
        made.add_row(f"{budget:g}", *(f"{counts.get('constant', 0)} of {sum(counts.values())}" for counts in held))
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS, help="folders of samples/")
    parser.add_argument("--budgets", type=float, nargs="+", choices=UNIFORM, default=[*UNIFORM], help="bits per expert weight")
    parser.add_argument("--tokens", type=int, default=6144, help="held-out tokens of each kind")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "few_bits_engines.json")
    parser.add_argument("--folder", type=Path, help="a folder for the calibrations; default: a temporary one")
    arguments = parser.parse_args()
    note, here = Console(stderr=True), origin()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(arguments.output.read_text()) if arguments.output.is_file() else []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            known = Counter((row["budget"], row["plan"]) for row in rows if row["model"] == name)
            complete = {plan for plan, texts in known.items() if texts == 2}
            rows = [row for row in rows if row["model"] != name or (row["budget"], row["plan"]) in complete]
            folder = arguments.folder or Path(temporary)
            for row in rows_of_model(name, arguments.budgets, arguments.tokens, folder, complete, note):
                rows.append({**row, **here})
                arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows, Console(width=200))


if __name__ == "__main__":
    main()
