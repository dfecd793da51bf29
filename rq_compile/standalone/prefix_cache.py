"""The caches of sequences that have ended, for prompts that begin with the same tokens: the next turn of a conversation, for one.

Keys and values of a token depend only on the tokens before it. A prompt therefore takes those of its longest known beginning, and
only the rest of it is read. The state of a recurrent or convolution layer stands for all tokens of its sequence, so a model with
such layers takes over whole sequences only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .decoding import axes, first_columns


class PrefixCache:
    """``cache``: the tensors of the cache, as in an engine's manifest. ``most_bytes``: of all sequences that are kept. The least
    recently used ones leave first."""

    def __init__(self, cache: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._by_token = [axes(tensor)[1] for tensor in cache]
        self._kept: list[tuple[np.ndarray, list[np.ndarray]]] = []  # the most recently used last

    def keep(self, tokens: Sequence[int], arrays: Sequence[np.ndarray]) -> None:
        """Keep the cache of ``tokens``, one array for each tensor with one row. The arrays must not change any more."""
        if not len(tokens) or _bytes(arrays) > self.most_bytes:
            return
        new = np.array(tokens)
        # What is a beginning of another sequence is of no more use, unless a state belongs to exactly these tokens.
        if None not in self._by_token:
            self._kept = [(known, held) for known, held in self._kept if _shared(known, new) < len(known)]
        self._kept.append((new, list(arrays)))
        while sum(_bytes(held) for _, held in self._kept) > self.most_bytes:
            del self._kept[0]

    def longest(self, prompt: Sequence[int]) -> tuple[int, list[np.ndarray]]:
        """How many of the first tokens of ``prompt`` are known, and their cache. The last token must be read, for its logits."""
        given = np.array(prompt[:-1])
        found = [self._usable(known, _shared(known, given)) for known, _ in self._kept]
        if (count := max(found, default=0)) == 0:
            return 0, []
        used = self._kept.pop(found.index(count))
        self._kept.append(used)
        some = [first_columns(array, axis, count) for axis, array in zip(self._by_token, used[1], strict=True)]
        return count, [np.ascontiguousarray(array) for array in some]

    def _usable(self, known: np.ndarray, shared: int) -> int:
        """How many of the ``shared`` first tokens of ``known`` can be taken over."""
        return 0 if None in self._by_token and shared < len(known) else shared


def _bytes(arrays: Sequence[np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays)


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """The number of equal tokens before the first difference."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length
