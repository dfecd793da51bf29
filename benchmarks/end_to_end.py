"""Whole models on the CPU: tokens per second of our engines, of the lowering ``stock`` and of transformers; and the time by op.

``sample`` is samples/olmoe (trained); ``layers`` are three layers of OLMoE-1B-7B's widths with half its experts (1.6 GB, random
weights). All engines of a model are compiled with one plan, at memory 0.6. transformers runs in fp32, with its default
``grouped_mm`` and with ``eager``. All variants of a model take turns in one process, so that changes of the machine's speed
affect all alike. Before each run there is a pause, so that the threads of the previous variant sleep. A round is the prefill of a
random prompt, then greedy decoding, at batch 1. Speeds are medians; ``ratio`` is relative to transformers' default.

    python benchmarks/end_to_end.py prepare --folder /scratch
    python benchmarks/end_to_end.py measure --folder /scratch -o benchmarks/results/end_to_end.json

``prepare`` compiles the engines; ``measure`` needs an idle machine. Its rows replace those of the same models in the output.
``--model small`` is a quick trial with 0.2 GB of random weights.

Other runtimes are compared by runtime_comparison.py.

The times by op come from ONNX Runtime's profile of our engines, summed by the groups in ``GROUPS``; ops in no group count as
``rest``. Decoding is profiled at the first token after the prompt.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from generated_checkpoint import OLMOE_1B_7B, SMALL, generate
from op_profile import op_times
from provenance import add_rows
from rich.console import Console

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model as Opened
from rq_compile.cli.main import main as rq_compile
from rq_compile.cli.tables import table
from rq_compile.evaluation.bench import time_round
from rq_compile.export.export import export_graph
from rq_compile.files import read_document
from rq_compile.lowerings import Lowering, Native, Stock
from rq_compile.planning.schema import Plan
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.language_model import LanguageModel
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

Row = dict[str, str | int | float]
ROOT = Path(__file__).parents[1]
TEXT = ROOT / "samples" / "text" / "hacker.calibration.txt"
CHARACTERS = 4000  # of the text, to calibrate with
RANDOM = {"layers": replace(OLMOE_1B_7B, layers=3, experts=32), "small": SMALL}
MODELS = {"sample": "samples/olmoe", "layers": "3 OLMoE layers", "small": "small OLMoE"}
BASE = "transformers, grouped_mm"
GROUPS = {
    "experts": ("Dispatch", "ExpertGemm", "Combine"),
    "dense part": ("DenseGemm",),
    "attention": ("CacheAttention", "LatentAttention", "RotaryEmbedding", "CausalMask"),
    "norms": ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    "router": ("Gemm", "Softmax", "TopK"),
}


# The lowering ``stock`` keeps its non-expert weights in fp32.
VARIANTS: dict[str, Lowering] = {
    "rq-compile, fp32 activations": Native(),
    "rq-compile, int8 activations": Native(activation_bits=8),
    "rq-compile, int8 activations and dense part": Native(activation_bits=8, dense_format="int8"),
    "stock, fp32 activations": Stock(),
    "stock, int8 activations": Stock(activation_bits=8),
}


@dataclass(frozen=True)
class Settings:
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int


class TransformersModel(Reference):
    """A model shared by several variants, each run with its own ``experts_implementation``."""

    def __init__(self, model: Any, experts_implementation: str, threads: int) -> None:
        super().__init__(model, threads)
        self.experts_implementation = experts_implementation

    def generate(self, prompt_ids: Sequence[int], max_tokens: int, *, stop: bool = True) -> Iterator[int]:
        self.model.set_experts_implementation(self.experts_implementation)
        return super().generate(prompt_ids, max_tokens, stop=stop)


def prepare(name: str, folder: Path) -> None:
    """Write an engine of each variant to ``folder``, all compiled with one plan, which is made here."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (path := checkpoint_of(name, folder)).exists():
        generate(RANDOM[name], path)
    checkpoint = Opened.open(path)
    text, calibration, document = (folder / name for name in ("text.txt", "calibration.json", "plan.json"))
    text.write_text(TEXT.read_text()[:CHARACTERS])
    for arguments in (
        ["calibrate", path, "--text", text, "--quantizer", "nearest", "-q", "-o", calibration],
        ["plan", calibration, "--memory", 0.6, "-q", "-o", document],
    ):
        rq_compile([str(argument) for argument in arguments], standalone_mode=False)
    plan, exported = read_document(Plan, document), export_graph(checkpoint)
    for variant, engine in engines(folder).items():
        compile_engine(checkpoint, plan, engine, VARIANTS[variant], exported=exported)


def checkpoint_of(name: str, folder: Path) -> Path:
    return folder / "checkpoint" if name in RANDOM else ROOT / "samples" / "olmoe"


def engines(folder: Path) -> dict[str, Path]:
    return {variant: folder / f"{number}.onnx" for number, variant in enumerate(VARIANTS)}


def measured(name: str, folder: Path, settings: Settings) -> Iterator[Row]:
    """The rows of what ``prepare`` wrote to ``folder``."""
    checkpoint = Opened.open(checkpoint_of(name, folder))
    models: dict[str, LanguageModel] = {
        variant: Engine.load(engine, settings.threads) for variant, engine in engines(folder).items()
    }
    shared = load_model(checkpoint)
    for implementation in ("grouped_mm", "eager"):
        models[f"transformers, {implementation}"] = TransformersModel(shared, implementation, settings.threads)
    yield from speeds(MODELS[name], models, checkpoint.config.vocab_size, settings)
    del models, shared
    for variant, engine in engines(folder).items():
        if VARIANTS[variant].name == "native":
            yield from profile(MODELS[name], variant, engine, settings)


def speeds(name: str, models: dict[str, LanguageModel], vocabulary: int, settings: Settings) -> Iterator[Row]:
    prompt = np.random.default_rng(0).integers(0, vocabulary, settings.prompt_tokens).tolist()
    rounds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number in range(settings.rounds + 1):
        for variant, model in models.items():
            speed = time_round(model, prompt, settings.new_tokens)
            if number > 0:  # the first warms up
                rounds[variant].append(speed)
    for stage, of_stage in (("prefill", 0), ("decode", 1)):
        medians = {variant: median(speed[of_stage] for speed in recorded) for variant, recorded in rounds.items()}
        for variant, tokens_per_second in medians.items():
            yield {
                "measure": "speed",
                "model": name,
                "variant": variant,
                "stage": stage,
                "threads": settings.threads,
                "prompt_tokens": settings.prompt_tokens,
                "new_tokens": settings.new_tokens,
                "rounds": settings.rounds,
                "tokens_per_s": round(tokens_per_second, 2),
                "ratio": round(tokens_per_second / medians[BASE], 3),
            }


def profile(name: str, variant: str, engine: Path, settings: Settings) -> Iterator[Row]:
    for stage, tokens, past in (("prefill", settings.prompt_tokens, 0), ("decode", 1, settings.prompt_tokens)):
        for op in op_times(engine, tokens, past, max(settings.rounds, 5), settings.threads):
            yield {
                "measure": "profile",
                "model": name,
                "variant": variant,
                "stage": stage,
                "threads": settings.threads,
                "group": next((group for group, ops in GROUPS.items() if op.op in ops), "rest"),
                "op": op.op,
                "nodes": round(op.nodes, 1),
                "microseconds": round(op.microseconds, 1),
                "share": round(op.share, 4),
            }


def show(rows: list[Row], console: Console) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        speed = {(row["variant"], row["stage"]): row for row in of_model if row["measure"] == "speed"}
        title = "{model}, {threads} threads: tokens/s ({prompt_tokens} prompt tokens, {new_tokens} new ones)"
        made = table(title.format_map(next(iter(speed.values()))), "", "prefill", "ratio", "decode", "ratio")
        for variant in dict.fromkeys(variant for variant, _ in speed):
            both = [speed[variant, stage] for stage in ("prefill", "decode")]
            made.add_row(str(variant), *(text for row in both for text in (f"{row['tokens_per_s']:.1f}", f"{row['ratio']:.2f}")))
        console.print(made)
        groups = (*GROUPS, "rest")
        made = table(f"{model}: share of the time by op", "", "", "nodes", "ms", *groups)
        for (variant, stage), ops in _by_run(of_model).items():
            total = sum(row["microseconds"] for row in ops)
            shares = [sum(row["microseconds"] for row in ops if row["group"] == group) / total for group in groups]
            nodes = sum(row["nodes"] for row in ops)
            made.add_row(variant, stage, f"{nodes:.0f}", f"{total / 1e3:.2f}", *(f"{share:.1%}" for share in shares))
        console.print(made)


def _by_run(rows: list[Row]) -> dict[tuple[str, str], list[Any]]:
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in rows:
        if row["measure"] == "profile":
            found[str(row["variant"]), str(row["stage"])].append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "measure"))
    parser.add_argument("--folder", type=Path, required=True, help="a folder for the engines, with 10 GB of free space")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["sample", "layers"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.stage == "prepare":
        for name in arguments.model:
            prepare(name, arguments.folder / name)
        return
    settings = Settings(arguments.prompt_tokens, arguments.new_tokens, arguments.rounds, arguments.threads)
    rows = [row for name in arguments.model for row in measured(name, arguments.folder / name, settings)]
    show(rows, Console(width=150))
    if arguments.output:
        add_rows(arguments.output, rows, "model")


if __name__ == "__main__":
    main()
