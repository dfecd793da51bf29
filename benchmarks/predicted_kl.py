"""Does the predicted error rank plans by their KL divergence? Beside the error of each layer alone, and with its sensitivity.

    python benchmarks/predicted_kl.py top1 --tokens 8192
    python benchmarks/predicted_kl.py qwen2-moe deepseek-v2 olmoe

For every plan of balance.py, made with and without sensitivities, and for random mixtures of formats, the experts of a trained
sample model get the weights that an engine would have, in transformers. That is faster than an engine for every plan, and thus
allows more text: ``--tokens`` of each kind of text of the calibration, and three times as many of another kind. The rank
correlation (Spearman) of the KL divergence with each predictor is printed, and that of the KL of one random half of the windows
with the other half, which shows the noise of the measurement. Then comes the KL of each policy, divided by that of ``optimal`` in
its bytes and with its predicted error (see balance.py), and the interval of this ratio over windows that are drawn again. All
rows go to benchmarks/results/predicted_kl.json.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from balance import LENGTH, MODELS, OTHER_KIND, PLANS, SAME_KIND, planned
from provenance import write_rows
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from rq_compile.architectures.layers import ExpertWeights
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.expert import StoredExpert, in_format, in_fp32, values_of, weight_squares
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import Statistics
from rq_compile.cli.tables import table
from rq_compile.evaluation.windows import cut
from rq_compile.planning.problem import error_weights
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import Format
from rq_compile.standalone.text import open_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "predicted_kl.json"
BATCH, RANDOM_MIXTURES, HALVES, DRAWS = 8, 12, 200, 2000
RIVALS = ("paper", "uniform", "frequency", "random")
TEXTS = {"same kind": SAME_KIND, "another kind": OTHER_KIND}
QUANTIZED: tuple[Format, ...] = ("int8", "int4")
# Of each layer, the format of each expert.
Mixture = tuple[tuple[Format, ...], ...]


class Experts:
    """A model in transformers whose experts can have the weights of several formats."""

    def __init__(self, checkpoint: Model, statistics: Statistics, dtype: Format) -> None:
        self.model = load_model(checkpoint)
        self._weights: dict[tuple[int, int, Format], tuple[torch.Tensor, torch.Tensor]] = {}
        self._places: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for number, layer in enumerate(checkpoint.layers):
            module: Any = self.model.get_submodule(layer.name)
            up = module.gate_up_proj if module.has_gate else module.up_proj
            pairs = [(up[e], module.down_proj[e]) for e in range(layer.geometry.experts)]
            self._places.append([tuple(w.T if module.is_transposed else w for w in pair) for pair in pairs])
            for expert in range(layer.geometry.experts):
                original = in_fp32(checkpoint.expert(layer, expert))
                rounded = replace(
                    original,
                    up_moment=statistics.input_moment(layer.name),
                    down_moment=statistics.intermediate_moment(layer.name, expert),
                )
                held: dict[Format, ExpertWeights | StoredExpert] = {dtype: original}
                for format in QUANTIZED:
                    held[format] = in_format(rounded, weight_squares(original), format, layer.geometry.block)[0]
                for format, weights in held.items():
                    up, down = (torch.tensor(values_of(matrix)) for matrix in (weights.up, weights.down))
                    self._weights[number, expert, format] = up, down

    def use(self, mixture: Mixture) -> None:
        for number, (places, formats) in enumerate(zip(self._places, mixture, strict=True)):
            for expert, (place, format) in enumerate(zip(places, formats, strict=True)):
                for to, values in zip(place, self._weights[number, expert, format], strict=True):
                    to.copy_(values)

    def log_probabilities(self, ids: np.ndarray) -> torch.Tensor:
        """``[batch, length - 1, vocabulary]``"""
        output = self.model(input_ids=torch.from_numpy(ids), use_cache=False)
        return output.logits[:, :-1].float().log_softmax(-1)


def mixture_of(plan: Plan) -> Mixture:
    """Copies of an expert have one format."""
    return tuple(
        tuple({slot.expert: slot.format for slot in layer.slots}[e] for e in range(layer.geometry.experts))
        for layer in plan.layers
    )


@dataclass
class Measured:
    """``share``: of the bytes before, None for a random mixture. ``plans``: the policies on one device that choose it."""

    mixture: Mixture
    share: float | None
    plans: list[str] = field(default_factory=list)


def mixtures(calibration: Calibration) -> list[Measured]:
    """Different ones."""
    unweighted = [layer.model_copy(update={"sensitivity": None}) for layer in calibration.layers]
    found: dict[Mixture, Measured] = {}
    for known in (calibration, calibration.model_copy(update={"layers": unweighted})):
        for policy, memory, ranks in PLANS:
            plan = planned(known, policy, memory, ranks)
            mixture = mixture_of(plan)
            measured = found.setdefault(mixture, Measured(mixture, plan.bytes_after / plan.bytes_before))
            if known is calibration and ranks == 1:
                measured.plans.append(policy)
    random = np.random.default_rng(5)
    for _ in range(RANDOM_MIXTURES):
        shares = [random.dirichlet([1, 1.5, 1]) for _ in calibration.layers]
        formats = np.array([calibration.dtype, *QUANTIZED])
        mixture = tuple(
            tuple(random.choice(formats, layer.geometry.experts, p=p).tolist())
            for layer, p in zip(calibration.layers, shares, strict=True)
        )
        found.setdefault(mixture, Measured(mixture, None))
    unchanged = tuple((calibration.dtype,) * layer.geometry.experts for layer in calibration.layers)
    return [measured for measured in found.values() if measured.mixture != unchanged]


def predictions(calibration: Calibration, mixture: Mixture) -> dict[str, float]:
    layers = calibration.layers
    errors = [
        sum(layer.error[format][expert] for expert, format in enumerate(formats) if format != calibration.dtype)
        for layer, formats in zip(layers, mixture, strict=True)
    ]
    weights = {
        "errors alone": [1.0] * len(layers),
        "with sensitivities": error_weights(calibration, in_nats=False),
    }
    return {name: float(np.dot(factors, errors)) for name, factors in weights.items()}


def rows_of(name: str, tokens: int) -> Iterator[dict[str, Any]]:
    """The KL of every window, by mixture and kind of text."""
    checkpoint = Model.open(ROOT / "samples" / name)
    texts = ROOT / "samples" / "text"
    given = {kind: (texts / f"{kind}.calibration.txt").read_text() for kind in SAME_KIND}
    calibration, tensors = calibrate(checkpoint, given, batch_size=BATCH, sequence_length=LENGTH, progress=lambda *_: None)
    statistics = Statistics.of(tensors)
    assert statistics is not None, "the calibration was for GPTQ"
    experts = Experts(checkpoint, statistics, calibration.dtype)
    tokenizer = open_tokenizer(checkpoint.path / "tokenizer.json")
    windows = {
        kind: cut(kind, (texts / f"{kind}.heldout.txt").read_text(), tokenizer, LENGTH).ids[: count // LENGTH]
        for kinds, count in ((SAME_KIND, tokens), (OTHER_KIND, 3 * tokens))
        for kind in kinds
    }
    batches = [(kind, ids[at : at + BATCH]) for kind, ids in windows.items() for at in range(0, len(ids), BATCH)]
    with torch.inference_mode():
        reference = [experts.log_probabilities(ids) for _, ids in batches]
        for measured in mixtures(calibration):
            experts.use(measured.mixture)
            kl: dict[str, list[float]] = {kind: [] for kind in windows}
            for (kind, ids), before in zip(batches, reference, strict=True):
                difference = before - experts.log_probabilities(ids)
                kl[kind] += (before.exp() * difference).double().sum(-1).mean(-1).tolist()
            predicted = predictions(calibration, measured.mixture)
            yield {"plans": measured.plans, "bytes": measured.share, "predicted": predicted, "kl": kl}


def correlations(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    groups = {
        "plans": [row for row in rows if row["bytes"] is not None],
        "plans, 0.45 to 0.65 of the bytes": [row for row in rows if row["bytes"] is not None and 0.45 < row["bytes"] < 0.65],
        "random mixtures": [row for row in rows if row["bytes"] is None],
    }
    for text, kinds in TEXTS.items():
        for group, some in groups.items():
            windows = [np.concatenate([row["kl"][kind] for kind in kinds]) for row in some]
            kl = [float(values.mean()) for values in windows]
            found = {name: spearmanr([row["predicted"][name] for row in some], kl).statistic for name in some[0]["predicted"]}
            halves = []
            for _ in range(HALVES):
                one, other = np.array_split(random.permutation(len(windows[0])), 2)
                halves.append(spearmanr([v[one].mean() for v in windows], [v[other].mean() for v in windows]).statistic)
            yield {"text": text, "group": group, "number": len(some), **found, "halves": float(np.mean(halves))}


def ratios(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The KL of each rival over that of ``optimal`` as it, 1 if both choose the same formats, with the interval in which 90 % of
    the ratios lie when the windows are drawn again (the bootstrap; Efron 1979)."""
    random = np.random.default_rng(0)
    of_plan = {plan: row for row in rows for plan in row["plans"]}
    for text, kinds in TEXTS.items():
        drawn = [random.integers(len(rows[0]["kl"][kind]), size=(DRAWS, len(rows[0]["kl"][kind]))) for kind in kinds]
        found: dict[str, Any] = {"text": text}
        for rival in RIVALS:
            ours, theirs = ([np.array(of_plan[plan]["kl"][kind]) for kind in kinds] for plan in (f"as {rival}", rival))
            found[f"KL of {rival} over optimal"] = mean_of(theirs) / mean_of(ours)
            again = [mean_of([kl[places] for kl, places in zip(side, drawn, strict=True)]) for side in (theirs, ours)]
            found[f"{rival}, 90 % of draws"] = np.percentile(again[0] / again[1], (5, 95)).round(3).tolist()
        yield found


def mean_of(kinds: list[np.ndarray]) -> np.ndarray:
    """The mean over windows, the last axis, and then over kinds of text."""
    return np.mean([kl.mean(-1) for kl in kinds], axis=0)


def shown(title: str, rows: list[dict[str, Any]]) -> Table:
    made = table(title, *rows[0])
    for row in rows:
        made.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, nargs="*", default=MODELS)
    parser.add_argument("--tokens", type=int, default=6144, help="of each kind of text of the calibration")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    console, done = Console(), list[dict[str, Any]]()
    for name in settings.model:
        rows = list(rows_of(name, settings.tokens))
        for title, found in (("rank correlation with KL", correlations(rows)), ("KL", ratios(rows))):
            kept = list(found)
            console.print(shown(f"{name}: {title}", kept))
            done += [{"model": name, "tokens": settings.tokens, **row} for row in kept]
        write_rows(settings.output, done)


if __name__ == "__main__":
    main()
