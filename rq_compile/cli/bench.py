"""``rq-compile bench``: prefill and decode speed of an engine, alone or against another engine or the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rq_compile.cli.opened import opened
from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.screen import Screen, on_screen

if TYPE_CHECKING:
    from rq_compile.runtime.language_model import LanguageModel


@click.command("bench")
@click.argument("engine", type=FILE)
@click.option("--against", type=FILE, help="Another engine (.onnx), or a checkpoint to run by transformers in fp32.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens to prefill.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens to decode.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="The median of these is shown.")
@threads_option
@on_screen
def command(
    screen: Screen,
    engine: Path,
    against: Path | None,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int | None,
) -> None:
    """Tokens per second of ENGINE, alone or against another."""
    from rq_compile.cli.tables import bench_tables
    from rq_compile.evaluation.bench import bench
    from rq_compile.runtime.engine import Engine

    loaded = Engine.load(engine, threads)
    other = None if against is None else load_either(screen, against, threads)
    with screen.progress("timing", "rounds") as progress:
        result = bench(
            loaded,
            other,
            names=(engine.name, against.name if against else ""),
            weights_sha256=loaded.manifest.weights.sha256,
            vocabulary=loaded.manifest.vocabulary,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            progress=progress,
        )
    screen.result(result, *bench_tables(result))


def load_either(screen: Screen, path: Path, threads: int | None) -> LanguageModel:
    from rq_compile.runtime.engine import Engine

    if path.suffix == ".onnx":
        return Engine.load(path, threads)
    from rq_compile.runtime.reference import Reference

    return Reference.load(opened(screen, path), threads)
