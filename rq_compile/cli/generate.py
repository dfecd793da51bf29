"""``rq-compile generate``: continue a prompt, token by token."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import click

from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError


@click.command("generate")
@click.argument("engine", type=FILE)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to add.")
@threads_option
@on_screen
def command(screen: Screen, engine: Path, prompt: str, max_tokens: int, threads: int | None) -> None:
    """Continue a prompt greedily with ENGINE."""
    from rq_compile.runtime.engine import Engine
    from rq_compile.standalone.text import TextStream, argument_text

    try:
        prompt = argument_text(prompt)
    except ValueError as error:
        raise UserError("--prompt is not UTF-8 text; give it in UTF-8", 2) from error
    loaded = Engine.load(engine, threads)
    prompt_ids = loaded.tokenizer.encode(prompt).ids
    if not loaded.manifest.end_of_text:
        screen.note(f"the model names no end-of-text token, so the text ends after {max_tokens} tokens (--max-tokens)")
    shown = "" if loaded.encoder_decoder else prompt
    # After a prompt that decodes to itself the continuation does, too: with the space that its first word begins with.
    follows = shown and loaded.tokenizer.decode(prompt_ids) == prompt
    stream = TextStream(loaded.tokenizer, before=prompt_ids if follows else ())
    tokens: list[int] = []
    start = monotonic()

    def show(text: str) -> None:
        if not screen.as_json:
            click.echo(text, nl=False)

    show(shown)
    for token in loaded.generate(prompt_ids, max_tokens):
        tokens.append(token)
        show(stream.push(token))
    show(stream.end() + "\n")
    seconds = monotonic() - start
    if screen.as_json:
        screen.result({"prompt": prompt, "text": loaded.tokenizer.decode(tokens), "tokens": tokens, "seconds": seconds})
    else:
        screen.note(f"{len(tokens)} tokens, {len(tokens) / max(seconds, 1e-9):.1f} tokens/s")
