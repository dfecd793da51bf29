"""``rq-compile generate``: continue a prompt, token by token."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import click

from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.screen import Screen, on_screen


@click.command("generate")
@click.argument("engine", type=FILE)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to add.")
@threads_option
@on_screen
def command(screen: Screen, engine: Path, prompt: str, max_tokens: int, threads: int | None) -> None:
    """Continue a prompt greedily with ENGINE."""
    from rq_compile.runtime.engine import Engine

    loaded = Engine.load(engine, threads)
    prompt_ids = loaded.tokenizer.encode(prompt).ids
    shown = "" if loaded.encoder_decoder else prompt
    tokens: list[int] = []
    text = ""
    start = monotonic()
    if not screen.as_json:
        click.echo(shown, nl=False)
    for token in loaded.generate(prompt_ids, max_tokens):
        tokens.append(token)
        # Decoding everything again is the only way that is right for every tokenizer: spaces and multi-byte
        # characters depend on the neighbours.
        longer = loaded.tokenizer.decode(tokens)
        if not screen.as_json and longer.startswith(text) and not longer.endswith("�"):
            click.echo(longer[len(text) :], nl=False)
            text = longer
    seconds = monotonic() - start
    if screen.as_json:
        screen.result({"prompt": prompt, "text": loaded.tokenizer.decode(tokens), "tokens": tokens, "seconds": seconds})
    else:
        click.echo()
        screen.note(f"{len(tokens)} tokens, {len(tokens) / max(seconds, 1e-9):.1f} tokens/s")
