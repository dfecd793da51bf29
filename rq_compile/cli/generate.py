"""``rq-compile generate``: continue a prompt, token by token."""

from __future__ import annotations

import json
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


@click.command("generate")
@click.argument("engine", type=FILE)
@click.option("--prompt", help="The text to continue.")
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
    prompt: str | None,
    batch: Path | None,
    max_tokens: int,
    sampling: Given,
    logprobs: int | None,
    threads: int | None,
) -> None:
    """Continue a prompt, or every prompt of a file, with ENGINE.

    Without options, tokens are chosen as the checkpoint's generation_config.json says: greedily, unless it sets do_sample. With
    --batch, each answer is a line of JSON: prompt, text, tokens and finish_reason.
    """
    from rq_compile.standalone.text import StopStrings, argument_text

    if batch is not None:
        if prompt is not None or logprobs is not None:
            other = "--prompt" if prompt is not None else "--logprobs"
            raise UserError(f"{other} has no effect with --batch {batch}; leave one of the two out", 2)
        continue_file(screen, engine, batch, max_tokens, sampling, threads)
        return
    if prompt is None:
        raise UserError("there is nothing to continue; give --prompt TEXT or --batch FILE", 2)
    try:
        prompt = argument_text(prompt)
    except ValueError as error:
        raise UserError("--prompt is not UTF-8 text; give it in UTF-8", 2) from error
    if logprobs is not None and not screen.as_json:
        raise UserError(f"--logprobs {logprobs} has no effect without --json; give --json, or leave it out", 2)
    loaded = rq.load(engine, threads)
    params = chosen(sampling, loaded.manifest.sampling.model_dump(), loaded.manifest.vocabulary, logprobs=logprobs)
    if not loaded.manifest.end_of_text:
        screen.note(f"the model does not name an end-of-text token, so the text ends after {max_tokens} tokens (--max-tokens)")
    choices: list[Choice] = []
    start = monotonic()

    def show(text: str) -> None:
        if not screen.as_json:
            click.echo(text, nl=False)

    show("" if loaded.encoder_decoder else prompt)
    for text in loaded.stream(prompt, max_tokens, on_choice=choices.append, sampling=params):
        show(text)
    show("\n")
    seconds = monotonic() - start
    if not screen.as_json:
        screen.note(f"{len(choices)} tokens, {len(choices) / max(seconds, 1e-9):.1f} tokens/s")
        return
    tokens = [choice.token for choice in choices]
    stops = StopStrings(params.stop)
    result = {"prompt": prompt, "text": stops.push(loaded.tokenizer.decode(tokens)) + stops.end(), "tokens": tokens}
    screen.result({**result, "seconds": seconds} | ({} if logprobs is None else {"logprobs": list(map(_logprobs, choices))}))


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
