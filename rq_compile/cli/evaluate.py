"""``rq-compile evaluate``: compare an engine with the checkpoint, which transformers runs, on held-out text."""

from __future__ import annotations

from pathlib import Path

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, text_option, threads_option
from rq_compile.cli.screen import Screen, on_screen


@click.command("evaluate")
@click.argument("engine", type=FILE)
@click.option("--reference", type=FILE, required=True, help="The checkpoint the engine was compiled from.")
@text_option
@click.option("--sequence-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a sequence.")
@threads_option
@on_screen
def command(
    screen: Screen, engine: Path, reference: Path, texts: tuple[Path, ...], sequence_length: int, threads: int | None
) -> None:
    """Measure perplexity, agreement, KL and LIS of ENGINE on text."""
    from rq_compile.texts import chat_template, read_texts

    contents = read_texts(texts, render=chat_template(reference))

    from rq_compile.cli.tables import evaluation_tables

    loaded = rq.load(engine, threads)
    screen.mute(loaded.rank)
    model = rq.open(reference)
    with screen.progress("evaluating", "tokens") as progress:
        evaluation = loaded.evaluate(model, contents, sequence_length=sequence_length, progress=progress)
    screen.result(evaluation, *evaluation_tables(evaluation))
