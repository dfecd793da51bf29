"""``rq-compile generate``: continue a prompt, token by token."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError


@click.command("generate")
@click.argument("engine", type=FILE)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate.")
@threads_option
@on_screen
def command(screen: Screen, engine: Path, prompt: str, max_tokens: int, threads: int | None) -> None:
    """Continue a prompt greedily with ENGINE."""
    from rq_compile.standalone.text import argument_text

    try:
        prompt = argument_text(prompt)
    except ValueError as error:
        raise UserError("--prompt is not UTF-8 text; give it in UTF-8", 2) from error
    loaded = rq.load(engine, threads)
    if not loaded.manifest.end_of_text:
        screen.note(f"the model does not name an end-of-text token, so the text ends after {max_tokens} tokens (--max-tokens)")
    tokens: list[int] = []
    start = monotonic()

    def show(text: str) -> None:
        if not screen.as_json:
            click.echo(text, nl=False)

    show("" if loaded.encoder_decoder else prompt)
    for text in loaded.stream(prompt, max_tokens, on_token=tokens.append):
        show(text)
    show("\n")
    seconds = monotonic() - start
    if screen.as_json:
        screen.result({"prompt": prompt, "text": loaded.tokenizer.decode(tokens), "tokens": tokens, "seconds": seconds})
    else:
        screen.note(f"{len(tokens)} tokens, {len(tokens) / max(seconds, 1e-9):.1f} tokens/s")
