"""Which slot formats pay below 4 bits? Plans of every sample model at 2.5, 3, 3.5 and 4.25 bits per expert weight.

1. Every candidate of ``candidates.py`` stores every expert. Its error is the gate-weighted squared error of the experts' outputs
   on calibration text, relative to the outputs. ``constant`` replaces an expert by its mean output (0 bits); its gate stays.
2. From these errors, plans choose a format for each expert, such that the sum of the errors is least within the bits. They are
   compared, on held-out text, with *uniform* GPTQ of the same bytes: one of int2, int3 and int4 for all experts, in the block
   that gives these bytes, or two of them in blocks of 128, shared out at random; the better of the two counts.

Everything runs in transformers, with the values that the weights have after they were stored. Candidates need no kernels.

    python benchmarks/few_bits.py                 # all sample models, a quarter of an hour on 2 cores
    python benchmarks/few_bits.py olmoe --tokens 4096

The rows are written to benchmarks/results/few_bits.json.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]

from balance import LENGTH, MODELS, OTHER_KIND, SAME_KIND
from candidates import BY_NAME, CANDIDATES, Candidate, learned, rounded
from provenance import write_rows

from rq_compile.architectures.activation import activate
from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.cli.tables import table
from rq_compile.evaluation.divergence import Divergence
from rq_compile.evaluation.windows import cut

BLOCK = 128
BUDGETS = (2.5, 3.0, 3.5, 4.25)
SOURCE_BITS = 16.0
# Uniform plans of exactly these bits, and pairs of formats to share out.
UNIFORM = {2.5: ("int2", 64), 3.0: ("int2", 32), 3.5: ("int3", 64), 4.25: ("int4", 128)}
SHARED = {2.5: ("int2", "int3"), 3.0: ("int2", "int3"), 3.5: ("int3", "int4"), 4.25: ("int4", "int4")}
PLANS = {
    "int8, int4, int3, int2": ("int8", "int4", "int3", "int2"),
    "and constant": ("int8", "int4", "int3", "int2", "constant"),
    "int8, int4, int2, constant": ("int8", "int4", "int2", "constant"),
    "int8, int4, constant": ("int8", "int4", "constant"),
    "zero points": ("int8", "int4 zero point", "int3 zero point", "int2 zero point"),
    "learned codebooks": ("int8", "learned 4", "learned 3", "learned 2"),
    "nf4, int3, int2": ("int8", "nf4", "int3", "int2"),
}


@dataclass
class Layer:
    """What calibration text showed of a layer: inputs ``[T, hidden]``, ``ids`` and ``gates [T, k]``, and the experts' matrices
    ``up [m, F, hidden]`` and ``down [m, hidden, intermediate]``."""

    name: str
    geometry: ExpertGeometry
    up: torch.Tensor
    down: torch.Tensor
    hidden: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor

    def pairs(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs and the gates of the tokens that chose ``expert``."""
        token, choice = (self.ids == expert).nonzero(as_tuple=True)
        return self.hidden[token], self.gates[token, choice]


@dataclass(frozen=True)
class Stored:
    """A layer's experts in one format: matrices, or for ``constant`` the mean outputs ``[m, hidden]``; ``error [m]`` of each,
    relative to the layer's output, and ``bits`` of a weight."""

    bits: float
    error: np.ndarray
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    means: torch.Tensor | None = None


def recorded(model: Any, checkpoint: Model, tokenizer: Tokenizer) -> list[Layer]:
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {layer.name: [] for layer in checkpoint.layers}
    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, inputs, keywords, name=layer.name: seen[name].append((*inputs, *keywords.values())), with_kwargs=True
        )
        for layer in checkpoint.layers
    ]
    for kind in SAME_KIND:
        text = (ROOT / "samples" / "text" / f"{kind}.calibration.txt").read_text()
        for batch in cut(kind, text, tokenizer, LENGTH).batches(model.config.vocab_size):
            model(input_ids=torch.from_numpy(batch))
    for hook in hooks:
        hook.remove()
    layers = []
    for layer in checkpoint.layers:
        hidden, ids, gates = (torch.cat([call[place] for call in seen[layer.name]]) for place in range(3))
        up, down = (
            torch.stack(
                [torch.from_numpy(checkpoint.matrix(layer, e, p).astype(np.float32)) for e in range(layer.geometry.experts)]
            )
            for p in ("up", "down")
        )
        layers.append(Layer(layer.name, layer.geometry, up, down, hidden.float(), ids, gates.float()))
    return layers


def outputs(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, geometry: ExpertGeometry) -> torch.Tensor:
    return activate(x @ up.T, geometry) @ down.T


def formats_of(layer: Layer, candidates: list[tuple[str, Candidate, int]]) -> dict[str, Stored]:
    """The experts in each candidate, given by a key, the candidate and its block, and in ``constant``."""
    geometry, experts = layer.geometry, range(layer.geometry.experts)
    inputs = layer.hidden.T @ layer.hidden
    middle = []
    targets, energy = [], torch.zeros_like(layer.hidden)
    for expert in experts:
        x, gates = layer.pairs(expert)
        activity = activate(x @ layer.up[expert].T, geometry)
        middle.append(activity.T @ activity)
        targets.append(activity @ layer.down[expert].T)
        energy.index_add_(0, (layer.ids == expert).nonzero(as_tuple=True)[0], targets[-1] * gates[:, None])
    whole = float(energy.double().square().sum())
    moments = torch.stack(middle)

    def error(expert: int, found: torch.Tensor) -> float:
        gates = layer.pairs(expert)[1]
        return float(((found - targets[expert]) * gates[:, None]).double().square().sum()) / whole

    stored = {}
    for key, candidate, block in candidates:
        books = [
            learned(weights, moment, candidate.bits, block) if candidate.codebook is None and not candidate.asymmetric else None
            for weights, moment in ((layer.up.flatten(0, 1)[None], inputs[None]), (layer.down, moments))
        ]
        up = rounded(layer.up.flatten(0, 1)[None], inputs[None], candidate, block, books[0]).view_as(layer.up)
        down = rounded(layer.down, moments, candidate, block, books[1])
        lost = [error(e, outputs(layer.pairs(e)[0], up[e], down[e], geometry)) for e in experts]
        widths = [candidate.width(min(block, matrix.shape[-1])) for matrix in (layer.up, layer.down)]
        bits = float(np.average(widths, weights=[layer.up[0].numel(), layer.down[0].numel()]))
        stored[key] = Stored(bits, np.array(lost), up, down)
    means = []
    for expert in experts:
        weight = layer.pairs(expert)[1].square()
        means.append((targets[expert] * weight[:, None]).sum(0) / weight.sum().clamp(min=1e-30))
    stored["constant"] = Stored(
        0.0, np.array([error(e, means[e].expand_as(targets[e])) for e in experts]), means=torch.stack(means)
    )
    stored["source"] = Stored(SOURCE_BITS, np.zeros(len(experts)), layer.up, layer.down)
    return stored


Choice = list[list[str]]  # of every layer, the format of every expert


def planned(layers: list[dict[str, Stored]], formats: tuple[str, ...], budget: float) -> Choice:
    """The least sum of errors within ``budget`` bits, by Lagrange's multiplier, found by halving; the rest is filled greedily."""
    errors = [np.stack([stored[format].error for format in formats], -1) for stored in layers]
    bits = [np.array([stored[format].bits for format in formats]) for stored in layers]
    experts = sum(len(error) for error in errors)

    def at(price: float) -> list[np.ndarray]:
        return [(error + price * width).argmin(-1) for error, width in zip(errors, bits, strict=True)]

    def used(choice: list[np.ndarray]) -> float:
        return float(sum(width[chosen].sum() for width, chosen in zip(bits, choice, strict=True))) / experts

    low, high = 1e-15, 1e3
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if used(at(middle)) <= budget else (middle, high)
    choice = at(high)
    while True:
        spare = (budget - used(choice)) * experts + 1e-9
        best: tuple[float, int, int, int] | None = None
        for number, (error, width, chosen) in enumerate(zip(errors, bits, choice, strict=True)):
            for expert, now in enumerate(chosen):
                for other in range(len(formats)):
                    more, less = width[other] - width[now], error[expert, now] - error[expert, other]
                    if 0 < more <= spare and less > 0 and (best is None or less / more > best[0]):
                        best = float(less / more), number, expert, other
        if best is None:
            return [[formats[place] for place in chosen] for chosen in choice]
        choice[best[1]][best[2]] = best[3]


def shared_out(layers: list[dict[str, Stored]], formats: tuple[str, str], budget: float) -> Choice:
    """Two formats at random, as many of the larger as fit."""
    small, large = formats
    counts = [len(stored["source"].error) for stored in layers]
    low, high = (float(np.average([stored[f].bits for stored in layers], weights=counts)) for f in formats)
    share = 1.0 if high <= low else min(1.0, max(0.0, (budget - low) / (high - low)))
    order = np.random.default_rng(0).permutation(sum(counts))
    flat = np.array([large if place < share * len(order) - 1e-9 else small for place in order])
    return [list(part) for part in np.split(flat, np.cumsum(counts)[:-1])]


def evaluated(
    model: Any, layers: list[Layer], stored: list[dict[str, Stored]], choice: Choice, windows: np.ndarray, exact: list[np.ndarray]
) -> Divergence:
    """``exact``: logits of the checkpoint for each of the ``windows``."""
    own = []
    for layer, formats, chosen in zip(layers, stored, choice, strict=True):
        module = model.get_submodule(layer.name)
        own.append((module, module.forward))
        module.forward = _experts(layer.geometry, [(formats[format], e) for e, format in enumerate(chosen)])
    total = Divergence()
    for batch, expected in zip(np.array_split(windows, len(exact)), exact, strict=True):
        logits = model(input_ids=torch.from_numpy(batch)).logits.numpy()
        for row, reference, found in zip(batch, expected, logits, strict=True):
            total.add(reference[:-1], found[:-1], row[1:])
    for module, forward in own:
        module.forward = forward
    return total


def _experts(geometry: ExpertGeometry, experts: list[tuple[Stored, int]]) -> Any:
    def forward(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for number, (stored, expert) in enumerate(experts):
            token, choice = (ids == number).nonzero(as_tuple=True)
            if stored.means is not None:
                made = stored.means[expert].expand(len(token), -1)
            else:
                assert stored.up is not None
                assert stored.down is not None
                made = outputs(hidden[token], stored.up[expert], stored.down[expert], geometry)
            result.index_add_(0, token, made * gates[token, choice, None])
        return result

    return forward


def rows(name: str, tokens: int, note: Console) -> Iterator[dict[str, Any]]:
    checkpoint = Model.open(ROOT / "samples" / name)
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    model = load_model(checkpoint)
    layers = recorded(model, checkpoint, tokenizer)
    wanted = [(candidate.name, candidate, 32 if candidate.powers_of_two else BLOCK) for candidate in CANDIDATES]
    wanted += [(f"{base}/{block}", BY_NAME[base], block) for base, block in UNIFORM.values() if block != BLOCK]
    stored = [formats_of(layer, wanted) for layer in layers]
    note.print(f"{name}: rounded")
    for key in stored[0]:
        bits = float(np.mean([held[key].bits for held in stored]))
        yield {"model": name, "format": key, "bits": bits, "error": float(np.mean([held[key].error.sum() for held in stored]))}

    kinds = {"same kind": SAME_KIND, "other kind": OTHER_KIND}
    for text, names in kinds.items():
        heldout = {kind: (ROOT / "samples" / "text" / f"{kind}.heldout.txt").read_text() for kind in names}
        count = tokens // LENGTH // len(names)
        windows = np.concatenate([cut(kind, whole, tokenizer, LENGTH).ids[:count] for kind, whole in heldout.items()])
        exact = [
            model(input_ids=torch.from_numpy(batch)).logits.numpy() for batch in np.array_split(windows, -(-len(windows) // 8))
        ]
        plans: list[tuple[float, str, Choice]] = []
        for budget in BUDGETS:
            base, block = UNIFORM[budget]
            key = base if block == BLOCK else f"{base}/{block}"
            plans.append((budget, f"uniform {base}, block {block}", [[key] * len(s["source"].error) for s in stored]))
            plans.append((budget, f"uniform, {' and '.join(SHARED[budget])}", shared_out(stored, SHARED[budget], budget)))
            least = {label: min(float(np.mean([s[f].bits for s in stored])) for f in formats) for label, formats in PLANS.items()}
            plans += [
                (budget, label, planned(stored, formats, budget))
                for label, formats in PLANS.items()
                if least[label] <= budget + 1e-9
            ]
        for budget, label, choice in plans:
            total = evaluated(model, layers, stored, choice, windows, exact)
            chosen = [format for layer in choice for format in layer]
            bits = float(np.mean([s[f].bits for s, layer in zip(stored, choice, strict=True) for f in layer]))
            error = float(np.mean([sum(s[f].error[e] for e, f in enumerate(c)) for s, c in zip(stored, choice, strict=True)]))
            yield {
                "model": name,
                "text": text,
                "budget": budget,
                "plan": label,
                "bits": bits,
                "predicted_error": error,
                "kl": total.kl,
                "perplexity": total.perplexity_engine / total.perplexity_reference - 1,
                "agreement": total.agreement,
                "formats": {format: chosen.count(format) for format in dict.fromkeys(chosen)},
            }


def cell(row: dict[str, Any] | None) -> str:
    return f"{row['kl']:.1e} {100 * row['perplexity']:+.1f} % {100 * row['agreement']:.1f} %" if row else ""


def show(found: list[dict[str, Any]], console: Console) -> None:
    models = list(dict.fromkeys(str(row["model"]) for row in found))
    of_format = {(row["model"], row["format"]): row for row in found if "format" in row}
    made = table("squared error of the experts' outputs, relative to the layers' outputs", "format", "bits", *models)
    for name in dict.fromkeys(row["format"] for row in found if "format" in row):
        held = [of_format[model, name] for model in models]
        made.add_row(name, f"{held[0]['bits']:.2f}", *(f"{row['error']:.1e}" for row in held))
    console.print(made)
    for text in dict.fromkeys(row["text"] for row in found if "text" in row):
        made = table(f"KL, perplexity, agreement on held-out text, {text}", "bits", "plan", *models)
        of_plan = {(row["budget"], row["plan"], row["model"]): row for row in found if row.get("text") == text}
        for budget, plan in dict.fromkeys((row["budget"], row["plan"]) for row in found if row.get("text") == text):
            cells = [of_plan.get((budget, plan, model)) for model in models]
            made.add_row(
                f"{budget:g}",
                plan,
                *(cell(row) for row in cells),
            )
        console.print(made)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS, help="folders of samples/; default: all")
    parser.add_argument("--tokens", type=int, default=6144, help="held-out tokens of each kind")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "few_bits.json")
    args = parser.parse_args()
    note = Console(stderr=True)
    found = [row for name in args.models for row in rows(name, args.tokens, note)]
    write_rows(args.output, found)
    show(found, Console(width=200))


if __name__ == "__main__":
    main()
