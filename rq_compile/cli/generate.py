"""``rq-compile generate``: continue prompts, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.sampling import Given, chosen, sampling_options
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError

if TYPE_CHECKING:
    from rq_compile.standalone.sampling import Choice

# Continues a prompt, and calls its argument with the new text piece by piece.
Continue = Callable[[str, Callable[[str], None]], list["Choice"]]


@click.command("generate")
@click.argument("engine", type=FILE)
@click.option("--prompt", "prompts", multiple=True, help="The text to continue; repeat it for several.")
@click.option(
    "--batch", type=FILE, help="A file of prompts, one a line, or .jsonl with prompt and parameters; they share every step."
)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate.")
@sampling_options
@click.option("--logprobs", type=int, help="With --json: log probabilities, also of this many most likely tokens.")
@threads_option
@on_screen
def command(
    screen: Screen,
    engine: Path,
    prompts: tuple[str, ...],
    batch: Path | None,
    max_tokens: int,
    sampling: Given,
    logprobs: int | None,
    threads: int | None,
) -> None:
    """Continue prompts, or every prompt of a file, with ENGINE. The ranks of an engine share the prompts.

    Without options, tokens are chosen as the checkpoint's generation_config.json says: greedily, unless it sets do_sample. With
    --batch, each answer is a line of JSON: prompt, text, tokens and finish_reason.
    """
    from rq_compile.standalone.text import StopStrings

    if batch is not None:
        if prompts or logprobs is not None:
            other = "--prompt" if prompts else "--logprobs"
            raise UserError(f"{other} has no effect with --batch {batch}; leave one of the two out", 2)
        continue_file(screen, engine, batch, max_tokens, sampling, threads)
        return
    if not prompts:
        raise UserError("there is nothing to continue; give --prompt TEXT or --batch FILE", 2)
    prompts = tuple(map(as_text, prompts))
    if logprobs is not None and not screen.as_json:
        raise UserError(f"--logprobs {logprobs} has no effect without --json; give --json, or leave it out", 2)
    loaded = rq.load(engine, threads)
    screen.mute(loaded.rank)
    params = chosen(sampling, loaded.manifest.sampling.model_dump(), loaded.manifest.vocabulary, logprobs=logprobs)
    if not loaded.manifest.end_of_text:
        screen.note(f"the model does not name an end-of-text token, so the text ends after {max_tokens} tokens (--max-tokens)")

    def continued(prompt: str, show: Callable[[str], None]) -> list[Choice]:
        choices: list[Choice] = []
        for text in loaded.stream(prompt, max_tokens, on_choice=choices.append, sampling=params):
            show(text)
        return choices

    def text_of(tokens: list[int]) -> str:
        stops = StopStrings(params.stop)
        return stops.push(loaded.tokenizer.decode(tokens)) + stops.end()

    start = monotonic()
    made = at_once(loaded, prompts, continued) if len(prompts) > 1 else [shown(screen, loaded, prompts[0], continued)]
    seconds = monotonic() - start
    results: list[dict[str, Any]] = []
    for prompt, choices in zip(prompts, made, strict=True):
        tokens = [choice.token for choice in choices]
        results.append({"prompt": prompt, "text": text_of(tokens), "tokens": tokens})
        if logprobs is not None:
            results[-1]["logprobs"] = list(map(_logprobs, choices))
    if screen.as_json:
        screen.result({**results[0], "seconds": seconds} if len(results) == 1 else {"prompts": results, "seconds": seconds})
    elif not screen.muted:
        if len(results) > 1:
            click.echo("\n\n".join(("" if loaded.encoder_decoder else made["prompt"]) + made["text"] for made in results))
        count = sum(len(choices) for choices in made)
        screen.note(f"{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s")


def shown(screen: Screen, engine: rq.Engine, prompt: str, continued: Continue) -> list[Choice]:
    """The continuation of one prompt, shown as it is made; with several ranks, the first makes it."""

    def show(text: str) -> None:
        if not (screen.as_json or screen.muted):
            click.echo(text, nl=False)

    show("" if engine.encoder_decoder else prompt)
    choices: list[Choice] = []
    if engine.rank == 0:
        choices = continued(prompt, show)
    else:
        engine.wait()
    show("\n")
    return choices


def at_once(engine: rq.Engine, prompts: tuple[str, ...], continued: Continue) -> list[list[Choice]]:
    """The continuations of all prompts, on every rank; each rank makes those of its own prompts."""
    size = engine.ranks.size if engine.ranks else 1
    mine: dict[int, list[Choice]] = {}
    for at in range(engine.rank, engine.rank + len(prompts), size):
        if at < len(prompts):
            mine[at] = continued(prompts[at], lambda text: None)
        else:
            engine.wait()
    if engine.ranks:
        mine = {at: choices for part in engine.ranks.gather(mine) for at, choices in part.items()}
    return [mine[at] for at in range(len(prompts))]


def as_text(prompt: str) -> str:
    """
    Raises:
        UserError: the prompt is not UTF-8.
    """
    from rq_compile.standalone.text import argument_text

    try:
        return argument_text(prompt)
    except ValueError as error:
        raise UserError("--prompt is not UTF-8 text; give it in UTF-8", 2) from error


def continue_file(screen: Screen, engine: Path, file: Path, max_tokens: int, sampling: Given, threads: int | None) -> None:
    """
    Raises:
        UserError: see ``read_prompts`` and ``continued``.
    """
    from rq_compile.cli.batch import continued, read_prompts

    prompts = read_prompts(file)
    loaded = rq.load(engine, threads)
    start, results = monotonic(), []
    for result in continued(loaded, prompts, sampling, max_tokens):
        results.append(result)
        if not screen.as_json:
            click.echo(json.dumps(result, ensure_ascii=False))
    seconds, tokens = monotonic() - start, sum(len(result["tokens"]) for result in results)
    if screen.as_json:
        screen.result({"answers": results, "seconds": seconds})
    else:
        screen.note(f"{len(results)} answers, {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s")


def _logprobs(choice: Choice) -> dict[str, Any]:
    return {"token": choice.token, "logprob": choice.logprob, "top": [{"token": token, "logprob": p} for token, p in choice.top]}
