"""``rq-compile generate --batch FILE``: continue many prompts, which share every step of the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq_compile.cli.sampling import Given, chosen
from rq_compile.errors import UserError, reason

if TYPE_CHECKING:
    from rq_compile.api import Engine
    from rq_compile.standalone.answer import Answer
    from rq_compile.standalone.sampling import SamplingParams
    from rq_compile.standalone.text import TextStream


@dataclass(frozen=True)
class Prompt:
    """A line of the file. ``settings``: parameters of ``SamplingParams`` that it states itself."""

    place: str
    text: str
    settings: Mapping[str, Any]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a text file, one a line, or of a ``.jsonl`` file, whose lines are objects with "prompt" and parameters.

    Raises:
        UserError: the file cannot be read, has no prompt, or a line is not such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; give a text file in UTF-8", 2) from error
    numbered = [(f"line {number} of {path}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} has no prompts; write one a line", 2)
    if path.suffix != ".jsonl":
        return [Prompt(place, line, {}) for place, line in numbered]
    return [_parsed(place, line) for place, line in numbered]


def _parsed(place: str, line: str) -> Prompt:
    try:
        settings = json.loads(line)
    except ValueError as error:
        raise UserError(f'{place} is not JSON: {reason(error)}; write for example {{"prompt": "Once", "seed": 1}}', 2) from error
    if not isinstance(settings, dict) or not isinstance(text := settings.pop("prompt", None), str):
        raise UserError(f'{place} has no text "prompt"; write for example {{"prompt": "Once", "seed": 1}}', 2)
    return Prompt(place, text, settings)


@dataclass
class Continuation:
    """A prompt while it is continued. It ends before the first of its stop strings."""

    prompt: Prompt
    answer: Answer
    stream: TextStream
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def listen(self) -> None:
        """Take the tokens that have come."""
        with suppress(TimeoutError):
            while not self.ended and (choice := self.answer.next(timeout=0)) is not None:
                self.tokens.append(choice.token)
                self.text += self.stream.push(choice.token)
                if self.stream.stopped is not None:
                    self.answer.cancel()
                    self.ended = True
            self.text += self.stream.end() if not self.ended else ""
            self.ended = True

    @property
    def result(self) -> dict[str, Any]:
        reason = "stop" if self.stream.stopped is not None else self.answer.finish_reason
        return {"prompt": self.prompt.text, "text": self.text, "tokens": self.tokens, "finish_reason": reason}


def _with_settings(options: SamplingParams, prompt: Prompt, vocabulary: int) -> SamplingParams:
    from rq_compile.standalone.sampling import SamplingError, SamplingParams

    known = {item.name for item in fields(SamplingParams)} - {"logprobs"}
    for name in prompt.settings.keys() - known:
        raise UserError(f"{prompt.place} has {name[:40]!r}, which is not a parameter; use {', '.join(sorted(known))}", 2)
    try:
        params = replace(options, **prompt.settings)
        params.check_tokens(vocabulary)
    except SamplingError as error:
        raise UserError(f"{prompt.place} has a value out of range: {reason(error)}; correct this line", 2) from error
    return params


def continued(engine: Engine, prompts: list[Prompt], given: Given, max_tokens: int) -> Iterator[dict[str, Any]]:
    """The results, in the order of ``prompts``; each as soon as it and those before it are complete.

    A prompt's own settings take the place of the options ``given`` and ``max_tokens``.

    Raises:
        UserError: a prompt is empty or too long, a setting is unknown or out of range, or the engine failed.
    """
    from rq_compile.standalone.answer import AnswerFailed, RequestRefused
    from rq_compile.standalone.text import TextStream

    defaults = engine.manifest.sampling.model_dump()
    options = chosen(given, defaults, engine.manifest.vocabulary, max_tokens=max_tokens)
    scheduler = engine.scheduler(max_waiting=len(prompts))
    running: list[Continuation] = []
    for prompt in prompts:
        params = _with_settings(options, prompt, engine.manifest.vocabulary)
        try:
            answer = scheduler.submit(engine.tokenizer.encode(prompt.text).ids, params)
        except RequestRefused as error:
            raise UserError(f"{prompt.place} cannot be continued: {reason(error)}; change or leave out this line", 2) from error
        running.append(Continuation(prompt, answer, TextStream(engine.tokenizer, stop=params.stop)))
    while running:
        scheduler.step()
        for continuation in running:
            try:
                continuation.listen()
            except AnswerFailed as error:
                raise UserError(
                    f"{continuation.prompt.place} was not continued: {reason(error)}; compile the engine again"
                ) from error
        while running and running[0].ended:
            yield running.pop(0).result
