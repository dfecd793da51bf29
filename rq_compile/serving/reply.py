"""The answers to one request as pieces of text, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rq_compile.standalone.answer import Answer, AnswerFailed
from rq_compile.standalone.sampling import Choice, SamplingParams
from rq_compile.standalone.text import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Piece:
    """New text of the answer number ``index``, with its tokens. ``finish_reason`` is None unless it is the last piece."""

    index: int
    text: str
    choices: Sequence[Choice] = field(default=())
    finish_reason: str | None = None


class Reply:
    """Belongs to the event loop in which it is created. ``answers``: those to the request."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Queue[Piece | AnswerFailed]()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The text of all answers. Answers that have not ended are cancelled when this iterator is closed.

        Raises:
            AnswerFailed: an answer ended with an error.
        """
        left = len(self.answers)
        try:
            while left:
                piece = await self._arrived.get()
                if isinstance(piece, AnswerFailed):
                    raise piece
                yield piece
                left -= piece.finish_reason is not None
        finally:
            self.cancel()

    def cancel(self) -> None:
        for answer in self.answers:
            answer.cancel()

    def arrive(self, piece: Piece | AnswerFailed) -> None:
        """Called in any thread."""
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, piece)


class Writer:
    """Turns the tokens of the answer number ``index`` of ``reply`` into text."""

    def __init__(self, reply: Reply, index: int, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._reply, self._index = reply, index
        self._text = TextStream(tokenizer, stop=params.stop)
        self._ended = False

    def write(self, answer: Answer, choices: Sequence[Choice | None]) -> None:
        """Pass on the next tokens of ``answer``, and None at its end."""
        if self._ended:
            return
        try:
            self._reply.arrive(self._piece(answer, choices))
        except AnswerFailed as error:
            self._fail(answer, error)
        except Exception as error:  # otherwise the client would wait forever
            self._fail(answer, AnswerFailed(f"the text of the answer failed: {error}"))

    def _piece(self, answer: Answer, choices: Sequence[Choice | None]) -> Piece:
        text, taken, reason = "", list[Choice](), None
        for choice in choices:
            if choice is None:
                if answer.error is not None:
                    raise AnswerFailed(answer.error)
                text += self._text.end()
                reason = "stop" if self._text.stopped is not None else answer.finish_reason or "stop"
            else:
                taken.append(choice)
                text += self._text.push(choice.token)
                if self._text.stopped is not None:
                    answer.cancel()
                    reason = "stop"
            if reason is not None:
                self._ended = True
                break
        return Piece(self._index, text, taken, reason)

    def _fail(self, answer: Answer, error: AnswerFailed) -> None:
        self._ended = True
        answer.cancel()
        self._reply.arrive(error)
