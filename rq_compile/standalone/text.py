"""Text in and text out: an engine's tokenizer, decoding token by token up to a stop string, and text from a command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN_BYTES = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and every token except special ones has at least one byte.
MOST_HELD = 8


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``. Truncation and padding are switched off, even if the file enables them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(path.read_bytes())  # from_file requires UTF-8 paths
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """Decodes tokens one by one. Together, the pieces of text are the decoded text of all tokens.

    The only exception are bytes that do not form a character. A byte-fallback tokenizer decodes a run of bytes as a whole, so
    later bytes could change text that was already returned. In this case, the later bytes are decoded separately.

    A token is decoded together with the tokens of the piece before it, because its text may depend on them (many tokenizers drop
    a space at the beginning of a text). Earlier tokens are not decoded again.

    The text ends before the first of the strings ``stop``, even if that string is spread over several tokens.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """``before``: tokens whose text precedes the stream, for example those of a prompt."""
        self._tokenizer = tokenizer
        self._before = list(before)
        self._held: list[int] = []
        self._stops = StopStrings(stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character or what may be a stop string is incomplete."""
        return self._stops.push(self._decoded(token))

    def end(self) -> str:
        """The text of the tokens that are still held back. An incomplete character becomes U+FFFD."""
        text = self._stops.push(self._new_text())
        self._held.clear()
        return text + self._stops.end()

    def _decoded(self, token: int) -> str:
        self._held.append(token)
        text = self._new_text()
        if text.endswith(UNKNOWN_BYTES) and len(self._held) < MOST_HELD:
            return ""
        if text:
            self._before, self._held = self._held, []
        elif len(self._held) == MOST_HELD:  # special tokens, for example
            self._held.clear()
        return text

    def _new_text(self) -> str:
        known = self._decode(self._before)
        text = self._decode([*self._before, *self._held])
        return text[len(known) :] if text.startswith(known) else self._decode(self._held)

    def _decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(list(tokens))


class StopStrings:
    """A text that comes in pieces, up to the first of some strings. No part of such a string is ever returned.

    If two strings overlap, the one that is complete first counts, so that the pieces do not matter.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = strings
        self._held = ""

    def push(self, piece: str) -> str:
        """What can be returned of the text so far, apart from what was returned before."""
        if self.found is not None:
            return ""
        if not self._strings:
            return piece
        text = self._held + piece
        places = [(place + len(string), place, string) for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            _, place, self.found = min(places)
            self._held = ""
            return text[:place]
        # The longest end of the text that a stop string may begin with.
        longest = max(map(len, self._strings)) - 1
        starts = range(max(0, len(text) - longest), len(text))
        cut = next((start for start in starts if any(string.startswith(text[start:]) for string in self._strings)), len(text))
        self._held = text[cut:]
        return text[:cut]

    def end(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held


def argument_text(argument: str) -> str:
    """A command-line argument as UTF-8, whatever the locale is.

    Raises:
        ValueError: its bytes are not UTF-8.
    """
    if argument.isascii() or not any("\ud800" <= character <= "\udfff" for character in argument):
        return argument
    # Python represents bytes that the locale's encoding lacks as surrogates.
    return os.fsencode(argument).decode()
