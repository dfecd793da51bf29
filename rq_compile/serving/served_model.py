"""The engine that a server answers with: its scheduler, which steps in a thread of its own, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

from rq_compile.errors import UserError
from rq_compile.runtime.engine import Engine
from rq_compile.serving.reply import Reply, Writer
from rq_compile.standalone.answer import Answer, QueueFull
from rq_compile.standalone.inbox import Inbox
from rq_compile.standalone.sampling import SamplingParams


class ServedModel:
    """``name``: the model's name for clients. ``slots``, ``max_length``, ``reuse_prefixes``: see ``Engine.scheduler``.
    ``max_waiting``: requests that may wait for a slot.

    Raises:
        UserError: the engine has no tokenizer, is an encoder-decoder, or its cache does not fit into the memory.
    """

    def __init__(
        self, engine: Engine, name: str, *, slots: int, max_length: int | None, max_waiting: int, reuse_prefixes: bool = True
    ) -> None:
        self.engine = engine
        self.name = name
        self.tokenizer = engine.tokenizer
        self.defaults = engine.manifest.sampling.model_dump()
        self.scheduler = engine.scheduler(slots, max_length, reuse_prefixes=reuse_prefixes)
        # The scheduler gives free slots to waiting requests only with its next step.
        self.most_choices = self.scheduler.max_waiting = slots + max_waiting
        self._open: list[Answer] = []
        self._opening = Lock()
        self._stepping = Thread(target=self.scheduler.run, name="scheduler", daemon=True)
        self._inbox: Inbox[Writer] = Inbox()
        # One thread turns the tokens of all answers into text: a thread for each would take the processor from the steps.
        self._writing = Thread(target=self._write, name="text", daemon=True)
        engine.chat_template  # noqa: B018 - a damaged template must be reported now, not at the first request

    def start(self) -> None:
        self._stepping.start()
        self._writing.start()

    def close(self) -> None:
        """End all answers with an error."""
        self.scheduler.close()
        if self._stepping.is_alive():
            self._stepping.join()
        self._inbox.close()
        if self._writing.is_alive():
            self._writing.join()

    @property
    def healthy(self) -> bool:
        return self._stepping.is_alive()

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a prompt of a completion, which begins with the special tokens of the tokenizer."""
        return prompt if isinstance(prompt, list) else self.tokenizer.encode(prompt).ids

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, reply: Reply) -> None:
        """Ask for one more answer of ``reply``.

        Raises:
            SamplingError: the parameters name a token outside the vocabulary.
            RequestRefused, QueueFull, AnswerFailed: see ``Scheduler.submit``.
        """
        params.check_tokens(self.engine.manifest.vocabulary)
        with self._opening:
            self._open = self._unanswered()
            if len(self._open) >= self.most_choices:
                raise QueueFull(f"{len(self._open)} requests are being answered or wait; send the request again later")
            writer = Writer(reply, len(reply.answers), self.tokenizer, params)
            answer = self.scheduler.submit(prompt_ids, params, self._inbox.listener(writer))
            self._open.append(answer)
            reply.answers.append(answer)

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return self.scheduler.waiting

    @property
    def running(self) -> int:
        """Answers in slots."""
        return max(0, len(self._unanswered()) - self.waiting)

    def _unanswered(self) -> list[Answer]:
        return [answer for answer in self._open if answer.finish_reason is None]

    def _write(self) -> None:
        """Turn the tokens that have arrived into text, until the inbox is closed."""
        while (arrived := self._inbox.take()) is not None:
            for writer, (answer, choices) in arrived.items():
                with suppress(RuntimeError):  # the event loop of the client has ended
                    writer.write(answer, choices)

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def chat_ids(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """
        Raises:
            UserError: the model has no chat template, or the template refuses the conversation.
        """
        if self.engine.chat_template is None:
            raise UserError(f"the model {self.name} has no chat template; use /v1/completions", 2)
        return self.engine.chat_ids(messages, **variables)
