"""What becomes of a request: the answer, token by token, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Literal

from .sampling import Choice, SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


class RequestRefused(ValueError):
    """A request that cannot be answered: one sentence for its sender."""


class QueueFull(RuntimeError):
    """Too many requests wait already; the same request may be accepted later."""


class AnswerFailed(RuntimeError):
    """The engine failed, or the scheduler was closed before the answer was complete."""


# Called in the scheduler's thread with each token of an answer, and with None at its end; it must return at once.
Listener = Callable[["Answer", Choice | None], None]


class Answer:
    """The answer to one request. Iterate over it, in one thread, to get its tokens as they come, unless a listener gets them.

    ``finish_reason``: None until the answer has ended. "stop": the token that ends a text came (it is not part of the answer);
    "length": the answer has ``max_tokens``; "cancelled"; "error": ``error`` says what failed. ``cached_tokens``: tokens of the
    prompt that were not read, because their cache was known.
    """

    def __init__(
        self, prompt_ids: Sequence[int], params: SamplingParams, max_tokens: int, listener: Listener | None = None
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.cancelled = False
        self.cached_tokens = 0
        self._choices: SimpleQueue[Choice | None] = SimpleQueue()
        self._listener = listener

    def __iter__(self) -> Iterator[Choice]:
        """
        Raises:
            AnswerFailed: the answer ended with an error.
        """
        while (choice := self.next()) is not None:
            yield choice

    def next(self, timeout: float | None = None) -> Choice | None:
        """The next token; None at the end of the answer. Waits up to ``timeout`` seconds.

        Raises:
            TimeoutError: no token came within ``timeout``.
            AnswerFailed: the answer ended with an error.
        """
        try:
            choice = self._choices.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None
        if choice is None:
            self._choices.put(None)
            if self.error is not None:
                raise AnswerFailed(self.error)
        return choice

    def cancel(self) -> None:
        """End the answer before its next token. Its slot becomes free with the scheduler's next step."""
        self.cancelled = True

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """For the scheduler, as ``put``: no token comes any more."""
        self.error, self.finish_reason = error, reason
        self.put(None)

    def put(self, choice: Choice | None) -> None:
        """For the scheduler: a token, or None at the end."""
        if self._listener is None:
            self._choices.put(choice)
        else:
            self._listener(self, choice)
