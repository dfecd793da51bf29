"""The main result: balance, memory and accuracy of every policy, measured in compiled engines on text not used for calibration.

Each model of samples/ is calibrated on three kinds of text, planned with each policy, compiled, and run in ONNX Runtime. It is
compared with transformers on held-out text of the same kinds ("same kind") and of a fourth ("other kind"). LIS is computed from
the rows that the engine's slots received, and is the mean over the layers: of all texts together, and of the text that is served
worst, which is what ``optimal`` and ``craft`` balance. Bytes count every slot of the plan, scales included.

    python benchmarks/balance.py                     # all models, about 40 minutes on 2 cores
    python benchmarks/balance.py olmoe --tokens 4096

"as paper", "as craft", ... are plans of ``optimal`` in no more bytes than that policy's plan takes, and with no more predicted
error (for ``paper``, a quarter of it). On ranks they are made for a batch alone, because the rivals do not weigh decoding. At
the end, the rank correlation of the predicted error with the measured KL divergence is printed: over all plans of a model, and
over its plans for half to 0.6 of the memory. Beside it stands the correlation without sensitivities, and that of the KL on one
half of the windows with the KL on the other, which shows the noise of the measurement.

The rows are written to benchmarks/results/balance.json. In the paper (arXiv 2602.19938), the mean of LIS before / after over the
30 rows of its table is 1.219 (1.041 to 1.414), which is 34 % of the excess on average.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[1]

from provenance import write_rows

from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.cli.tables import table
from rq_compile.evaluation.evaluate import evaluate
from rq_compile.evaluation.schema import Evaluation, LayerBalance, TextEvaluation
from rq_compile.evaluation.windows import Windows, cut
from rq_compile.export.export import export_graph
from rq_compile.planning.metrics import excess_removed
from rq_compile.planning.plan import make_plan
from rq_compile.planning.prediction import error
from rq_compile.planning.schema import Plan
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

MODELS = ("olmoe", "qwen2-moe", "top1", "deepseek-v2")
SAME_KIND = ("scripture", "hacker", "dictionary")
OTHER_KIND = ("satire",)
BATCH, LENGTH = 8, 256
# Policy or a variant of it (see ``planned``), memory, ranks. EPLB makes copies in full precision and needs memory for them; its
# row says how much.
PLANS = (
    ("none", 1.0, 1),
    ("paper", 1.0, 1),
    ("as paper", 1.0, 1),
    ("eplb", 1.5, 1),
    ("as eplb", 1.5, 1),
    ("as eplb, worst_text=0", 1.5, 1),
    ("craft", 1.5, 1),
    ("as craft", 1.5, 1),
    ("as craft, worst_text=0.5", 1.5, 1),
    ("uniform", 0.6, 1),
    ("as uniform", 0.6, 1),
    ("frequency", 0.6, 1),
    ("as frequency", 0.6, 1),
    ("random", 0.6, 1),
    ("as random", 0.6, 1),
    ("optimal", 0.5, 1),
    ("optimal", 0.6, 1),
    ("optimal", 0.75, 1),
    ("optimal", 1.0, 1),
    ("place", 1.0, 4),
    ("paper", 1.0, 4),
    ("as paper", 1.0, 4),
    ("eplb", 1.5, 4),
    ("as eplb", 1.5, 4),
    ("craft", 1.5, 4),
    ("as craft", 1.5, 4),
    ("optimal", 0.6, 4),
    ("optimal", 1.0, 4),
    ("eased", 1.0, 4),
)
# The part of a rival's predicted error that ``optimal`` may have, where it is not all of it.
ERROR_SHARE = {"paper": 1 / 4}


class Remembered:
    """A reference whose logits are computed once for each batch, however many engines are compared with it."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.seen = reference, dict[bytes, np.ndarray]()
        self.encoder_decoder, self.decoder_start = reference.encoder_decoder, reference.decoder_start

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, decoder_input_ids: np.ndarray | None = None
    ) -> np.ndarray:
        key = input_ids.tobytes()
        if key not in self.seen:
            self.seen[key] = self.reference.logits(input_ids, attention_mask, decoder_input_ids)
        return self.seen[key]

    def generate(self, prompt_ids: Sequence[int], max_tokens: int, *, stop: bool = True) -> Iterator[int]:
        return self.reference.generate(prompt_ids, max_tokens, stop=stop)


def windows(engine: Engine, kind: str, tokens: int) -> Windows:
    text = (ROOT / "samples" / "text" / f"{kind}.heldout.txt").read_text()
    whole = cut(kind, text, engine.tokenizer, LENGTH)
    return Windows(kind, whole.ids[: max(1, tokens // LENGTH)])


def halves(text: Windows) -> list[Windows]:
    """Every other window, so that the halves are of one kind."""
    return [Windows(f"{text.name} {half}", text.ids[half::2]) for half in (0, 1)]


def kl_of(parts: list[TextEvaluation]) -> float:
    return sum((part.kl or 0.0) * part.predictions for part in parts) / sum(part.predictions for part in parts)


def rows_of_plan(name: str, plan: Plan, engine: Engine, reference: Remembered, tokens: int) -> Iterator[dict[str, Any]]:
    for kind, texts in (("same kind", SAME_KIND), ("other kind", OTHER_KIND)):
        parts = [half for text in texts for half in halves(windows(engine, text, tokens // len(texts)))]
        found = evaluate(engine, reference, parts, reference_name=name)

        def over_layers(field: str, layers: list[LayerBalance] = found.total.layers) -> float | None:
            values = [getattr(layer, field) for layer in layers]
            return None if None in values else mean(values)

        def worst_text(when: str, found: Evaluation = found) -> float:
            lis = [[getattr(layer, f"lis_{when}") for layer in part.layers] for part in found.texts]
            return float(np.max(lis, axis=0).mean())

        yield {
            "model": name,
            "text": kind,
            "policy": plan.policy,
            "memory": plan.memory,
            "ranks": plan.ranks,
            "tolerance": plan.options.get("tolerance"),
            "max_error": plan.options.get("max_error") or None,
            "predicted_error": mean(layer.predicted.error for layer in plan.layers),
            "lis_before": over_layers("lis_before"),
            "lis_after": over_layers("lis_after"),
            "worst_text_lis_before": worst_text("before"),
            "worst_text_lis_after": worst_text("after"),
            "strict_lis_before": over_layers("strict_lis_before"),
            "strict_lis_after": over_layers("strict_lis_after"),
            "rank_imbalance_before": over_layers("rank_imbalance_before"),
            "rank_imbalance_after": over_layers("rank_imbalance_after"),
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
            "ppl_before": found.total.perplexity_reference,
            "ppl_after": found.total.perplexity_engine,
            "top1_agreement": found.total.agreement,
            "kl": found.total.kl,
            "kl_of_halves": [kl_of(found.texts[half::2]) for half in (0, 1)],
        }


def rows_of_model(name: str, tokens: int, note: Console) -> Iterator[dict[str, Any]]:
    checkpoint = Model.open(ROOT / "samples" / name)
    texts = {kind: (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
    calibration, tensors = calibrate(checkpoint, texts, batch_size=BATCH, sequence_length=LENGTH, progress=lambda *_: None)
    exported, reference = export_graph(checkpoint), Remembered(Reference.load(checkpoint))
    for policy, memory, ranks in PLANS:
        plan = planned(calibration, policy, memory, ranks)
        note.print(f"{name}: {policy}, memory {memory:g}, {ranks} ranks")
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "model.onnx"
            compile_engine(checkpoint, plan, output, "native", Statistics.of(tensors), exported)
            unweighted = mean(
                error(layer, held.slots, calibration.dtype) for layer, held in zip(calibration.layers, plan.layers, strict=True)
            )
            for row in rows_of_plan(name, plan, Engine.load(output), reference, tokens):
                yield {"plan": policy, **row, "unweighted_error": unweighted}


def planned(calibration: Calibration, policy: str, memory: float, ranks: int) -> Plan:
    """A plan for lanes on one device, or for ``ranks`` devices: the two cases in which the busiest determines the time.

    "as POLICY": ``optimal`` in no more bytes than the plan of the policy takes, and with no more predicted error. If that is 0,
    experts stay in the checkpoint's format. "as POLICY, worst_text=W": with this option. "eased": ``optimal`` that tolerates an
    imbalance of a tenth.
    """
    target = "batched" if ranks == 1 else "cpu"
    options: dict[str, Any] = {}
    if policy.startswith("as "):
        rival, *weight = policy.removeprefix("as ").split(", worst_text=")
        theirs = planned(calibration, rival, memory, ranks)
        memory = theirs.bytes_after / theirs.bytes_before
        most = ERROR_SHARE.get(rival, 1.0) * mean(layer.predicted.error for layer in theirs.layers)
        options = {"max_error": most} if most else {"formats": calibration.dtype}
        if ranks > 1:
            options["tokens"] = BATCH * LENGTH
        if weight:
            options["worst_text"] = float(weight[0])
    elif policy == "eased":
        options["tolerance"] = 0.1
    policy = "optimal" if options else policy
    return make_plan(calibration, policy=policy, memory=memory, ranks=ranks, target=target, **options)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    columns = ("LIS", "excess removed", "worst text", "strict LIS", "ranks", "bytes", "perplexity", "top-1", "KL")
    made = table("held-out text", "model, text, policy, memory", *columns)
    for row in rows:
        before, after = row["lis_before"], row["lis_after"]
        ranks = f"{row['rank_imbalance_before']:.2f} -> {row['rank_imbalance_after']:.2f}" if row["ranks"] != 1 else ""
        made.add_row(
            f"{row['model']}, {row['text']}, {row['plan']} {row['memory']:.4g}"
            + (f", {row['ranks']} ranks" if ranks else "")
            + (f", error up to {row['max_error']:.1e}" if row["max_error"] else "")
            + (f", tolerance {row['tolerance']:g}" if row["tolerance"] not in (None, 0.01) else ""),
            f"{before:.2f} -> {after:.2f}",
            f"{100 * excess_removed(before, after):.1f} %",
            f"{row['worst_text_lis_before']:.2f} -> {row['worst_text_lis_after']:.2f}",
            f"{row['strict_lis_before']:.2f} -> {row['strict_lis_after']:.2f}",
            ranks,
            f"{row['bytes_after'] / row['bytes_before']:.3f}",
            f"{100 * (row['ppl_after'] / row['ppl_before'] - 1):+.2f} %",
            f"{100 * row['top1_agreement']:.2f} %",
            f"{row['kl']:.1e}",
        )
    console.print(made)
    whole = [row for row in rows if (row["plan"], row["memory"]) == ("optimal", 1.0)]
    ratios = [row["lis_before"] / row["lis_after"] for row in whole]
    console.print(
        f"LIS before / after, optimal at 1.0: mean {mean(ratios):.3f}, best {max(ratios):.3f}; the paper: 1.219, best 1.414"
    )
    show_correlations(rows, console)


def show_correlations(rows: list[dict[str, Any]], console: Console) -> None:
    """Rank correlations of predictions with the measured KL divergence, over the plans that change the model, and of the KL of
    both halves of the text. Plans with the same weights count once."""
    made = table("rank correlation with KL", "model, text, plans", "number", "predicted error", "without sensitivities", "halves")
    changing = [row for row in rows if row["predicted_error"]]
    groups = {
        "all": lambda row: True,
        "0.45 to 0.65 of the bytes": lambda row: 0.45 < row["bytes_after"] / row["bytes_before"] < 0.65,
    }
    for (model, text), (name, held) in itertools.product(
        dict.fromkeys((row["model"], row["text"]) for row in changing), groups.items()
    ):
        alike = [row for row in changing if (row["model"], row["text"]) == (model, text) and held(row)]
        group = list({f"{row['kl']:.4g}": row for row in alike}.values())
        if len(group) > 2:
            found = [
                spearmanr([row[predictor] for row in group], [row["kl"] for row in group]).statistic
                for predictor in ("predicted_error", "unweighted_error")
            ]
            found.append(spearmanr(*zip(*(row["kl_of_halves"] for row in group), strict=True)).statistic)
            made.add_row(f"{model}, {text}, {name}", str(len(group)), *(f"{value:+.3f}" for value in found))
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS, help="folders of samples/")
    parser.add_argument("--tokens", type=int, default=12288, help="held-out tokens of each kind")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "balance.json")
    arguments = parser.parse_args()
    note = Console(stderr=True)
    rows = [row for model in arguments.models for row in rows_of_model(model, arguments.tokens, note)]
    write_rows(arguments.output, rows)
    show(rows, Console(width=170))


if __name__ == "__main__":
    main()
