"""The engine that a server answers with: its scheduler, which steps in a thread of its own, and its text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock, Thread
from typing import Any

from rq_compile.errors import UserError
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.sampling import Choice, SamplingParams
from rq_compile.standalone.scheduler import Answer, AnswerFailed, QueueFull
from rq_compile.standalone.text import TextStream


@dataclass(frozen=True)
class Piece:
    """New text of the answer number ``index``, with its tokens. ``finish_reason`` is None unless it is the last piece."""

    index: int
    text: str
    choices: Sequence[Choice] = field(default=())
    finish_reason: str | None = None


class ServedModel:
    """``name``: the model's name for clients. ``slots``, ``max_length``: see ``Engine.scheduler``. ``max_waiting``: requests that
    may wait for a slot.

    Raises:
        UserError: the engine has no tokenizer, is an encoder-decoder, or its cache does not fit into the memory.
    """

    def __init__(self, engine: Engine, name: str, *, slots: int, max_length: int | None, max_waiting: int) -> None:
        self.engine = engine
        self.name = name
        self.tokenizer = engine.tokenizer
        self.defaults = engine.manifest.sampling.model_dump()
        self.scheduler = engine.scheduler(slots, max_length)
        # The scheduler gives free slots to waiting requests only with its next step.
        self.most_choices = self.scheduler.max_waiting = slots + max_waiting
        self._open: list[Answer] = []
        self._opening = Lock()
        self._stepping = Thread(target=self.scheduler.run, name="scheduler", daemon=True)
        # Each answer has a thread that waits for its tokens and turns them into text.
        self._readers = ThreadPoolExecutor(self.most_choices, "answer")
        engine.chat_template  # noqa: B018 - a damaged template must be reported now, not at the first request

    def start(self) -> None:
        self._stepping.start()

    def close(self) -> None:
        """End all answers with an error."""
        self.scheduler.close()
        if self._stepping.is_alive():
            self._stepping.join()
        self._readers.shutdown()

    @property
    def healthy(self) -> bool:
        return self._stepping.is_alive()

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a prompt of a completion, which begins with the special tokens of the tokenizer."""
        return prompt if isinstance(prompt, list) else self.tokenizer.encode(prompt).ids

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Answer:
        """
        Raises:
            SamplingError: the parameters name a token outside the vocabulary.
            RequestRefused, QueueFull, AnswerFailed: see ``Scheduler.submit``.
        """
        params.check_tokens(self.engine.manifest.vocabulary)
        with self._opening:
            self._open = self._unanswered()
            if len(self._open) >= self.most_choices:
                raise QueueFull(f"{len(self._open)} requests are being answered or wait; send the request again later")
            answer = self.scheduler.submit(prompt_ids, params)
            self._open.append(answer)
            return answer

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

    async def pieces(self, answers: Sequence[Answer]) -> AsyncGenerator[Piece, None]:
        """The text of all ``answers`` as it comes. Answers that have not ended are cancelled when this iterator is closed.

        Raises:
            AnswerFailed: an answer ended with an error.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()

        def arrive(piece: Piece | Exception) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, piece)

        try:
            for index, answer in enumerate(answers):
                self._readers.submit(self._read, index, answer, arrive)
            left = len(answers)
            while left:
                piece = await arrived.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                left -= piece.finish_reason is not None
        finally:
            for answer in answers:
                answer.cancel()

    def _read(self, index: int, answer: Answer, arrive: Callable[[Piece | Exception], None]) -> None:
        text = TextStream(self.tokenizer, stop=answer.params.stop)
        try:
            for choice in answer:
                piece = text.push(choice.token)
                if text.stopped is not None:
                    answer.cancel()
                    arrive(Piece(index, piece, [choice], "stop"))
                    return
                arrive(Piece(index, piece, [choice]))
            rest = text.end()
            reason = "stop" if text.stopped is not None else answer.finish_reason
            arrive(Piece(index, rest, (), reason or "stop"))
        except AnswerFailed as error:
            arrive(error)
        except Exception as error:  # otherwise the client would wait forever
            arrive(AnswerFailed(f"the text of the answer failed: {error}"))

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
