"""``rq-compile chat``: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.sampling import Given, chosen, sampling_options
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError

HELP = "/reset begins a new conversation, and /exit ends; Ctrl-C stops an answer"
Messages = list[dict[str, str]]


@click.command("chat")
@click.argument("engine", type=FILE)
@click.option("--system", help="The system message.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens of an answer.")
@sampling_options
@threads_option
@on_screen
def command(screen: Screen, engine: Path, system: str | None, max_tokens: int, sampling: Given, threads: int | None) -> None:
    """Talk with ENGINE. Each line is a message; /reset begins a new conversation, and /exit or the end of the input ends.

    Tokens are chosen as the checkpoint's generation_config.json says, unless options say otherwise.
    """
    from rq_compile.runtime.files import check_one_process

    check_one_process(engine, "chat")
    loaded = rq.load(engine, threads)
    params = chosen(sampling, loaded.manifest.sampling.model_dump(), loaded.manifest.vocabulary)
    begin: Messages = [] if system is None else [{"role": "system", "content": system}]
    loaded.chat_ids([*begin, {"role": "user", "content": "Hello"}])  # an engine that cannot chat must say so now
    messages, prefix_cache = [*begin], loaded.prefix_cache()
    if sys.stdin.isatty():
        screen.note(HELP)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = [*begin]
            screen.note("a new conversation begins")
        elif line in ("/help", "/?"):
            screen.note(HELP)
        elif line.startswith("/") and " " not in line and not line.startswith("//"):
            screen.note(f"there is no command {line}; {HELP}")
        else:
            messages.append({"role": "user", "content": line})
            most = min(max_tokens, _room(loaded, messages))
            answer = _answered(screen, loaded.chat(messages, most, sampling=params, prefix_cache=prefix_cache))
            messages.append({"role": "assistant", "content": answer})
    if screen.as_json:
        screen.result({"messages": messages})


def _lines() -> Iterator[str]:
    """The lines that are not empty, of the terminal or of a pipe."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    import readline  # noqa: F401 - input() then has a history and can be edited

    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo()
            return
        if line.strip():
            yield line.strip()


def _room(engine: rq.Engine, messages: Messages) -> int:
    """How many tokens an answer can have."""
    length, context = len(engine.chat_ids(messages)), engine.manifest.context_length or 2**31
    if length >= context:
        raise UserError(
            f"the conversation has {length} tokens, and the context of the model has {context}; start a new one with /reset"
        )
    return context - length


def _answered(screen: Screen, answer: Iterator[str]) -> str:
    pieces: list[str] = []
    try:
        for piece in answer:
            pieces.append(piece)
            if not screen.as_json:
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        # The rest of the conversation goes on with what there is of the answer.
    if not screen.as_json:
        click.echo()
    return "".join(pieces)
