"""``rq-compile bench``: prefill and decode speed of an engine, alone or against another engine or the checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.screen import Screen, on_screen


@click.command("bench")
@click.argument("engine", type=FILE)
@click.option("--against", type=FILE, help="Another engine (.onnx), or a checkpoint, which transformers runs in fp32.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens to prefill.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens to decode.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds to time; the median is shown.")
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
    """Measure the tokens per second of ENGINE, alone or in comparison."""
    from rq_compile.cli.tables import bench_tables

    loaded = rq.load(engine, threads)
    screen.mute(loaded.rank)
    with screen.progress("timing", "rounds") as progress:
        result = loaded.bench(against, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, progress=progress)
    screen.result(result, *bench_tables(result))
