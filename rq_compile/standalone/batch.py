"""The cache of sequences that take their steps together.

Sequences of different lengths are aligned at their ends: the cache of a shorter one begins with padding, which the attention mask
excludes. A new token of every sequence is then in the same column, so that a step moves nothing. A sequence that is not longer
than the others takes over the row of one that has ended, and nothing else is copied.

A tensor that grows in place has room for the columns of further steps, which write only what is new. Other tensors lie in two
arrays: a step reads one and writes the other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from .decoding import axes, first_columns, grows_in_place, shape_of
from .step_model import Steps


class Batch:
    """``lengths``: the tokens of each row in the cache, without padding. ``columns``: with padding, the same for all rows."""

    def __init__(self, model: Steps) -> None:
        self._model = model
        self._tensors = [_Tensor(tensor) for tensor in model.cache]
        self.lengths: list[int] = []
        self.columns = 0
        self._room = 0  # columns for which there is memory
        self._longest = 0  # that the rows may become

    def __len__(self) -> int:
        return len(self.lengths)

    def begin(self, longest: int, known: int = 0, cache: Sequence[np.ndarray] = ()) -> None:
        """Become the batch of one sequence of ``known`` tokens with their ``cache``, which will have at most ``longest``."""
        self.lengths, self.columns, self._longest, self._room = [known], known, longest, longest
        for number, tensor in enumerate(self._tensors):
            array = tensor.spare(1, known, longest)
            first_columns(array, tensor.by_token, known)[...] = cache[number] if known else 0
            tensor.take(array)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append ``ids`` int64 ``[rows, new]`` to the rows; logits fp32 ``[rows, vocabulary]`` of the last tokens."""
        rows, new = ids.shape
        if self.columns + new > self._room:
            self._longest = max(self._longest, max(self.lengths) + new)
            self.arrange(range(rows), [], self._longest)
        lengths, columns = np.array(self.lengths), self.columns + new
        mask = (np.arange(columns) >= columns - new - lengths[:, None]).astype(np.int64)
        positions = lengths[:, None] + np.arange(new)
        present = [tensor.array if tensor.in_place else tensor.spare(rows, columns, self._room) for tensor in self._tensors]
        logits = self._model.step(ids, mask, positions, [tensor.array for tensor in self._tensors], present)
        for tensor, array in zip(self._tensors, present, strict=True):
            if not tensor.in_place:
                tensor.take(array)
        self.columns = columns
        self.lengths = [length + new for length in self.lengths]
        return logits

    def arrange(self, keep: Sequence[int], joining: Sequence[Batch], longest: int) -> None:
        """Keep the rows ``keep`` and append those of the batches ``joining``. No row will have more than ``longest`` tokens.

        Copies the cache once; a batch that would only take over another one takes its arrays.
        """
        if not keep and not joining:
            self._tensors = [_Tensor(tensor) for tensor in self._model.cache]
            self.lengths, self.columns, self._room = [], 0, 0
            return
        if not keep and len(joining) == 1:
            (other,) = joining
            self._tensors, self.lengths = other._tensors, other.lengths
            self.columns, self._room, self._longest = other.columns, other._room, longest
            return
        sources = [(self, row) for row in keep] + [(batch, row) for batch in joining for row in range(len(batch))]
        lengths = [batch.lengths[row] for batch, row in sources]
        columns = max(lengths)
        arranged = [tensor.spare(len(sources), columns, longest) for tensor in self._tensors]
        for place, (batch, row) in enumerate(sources):
            self._copy(batch, row, arranged, place, columns)
        for tensor, array in zip(self._tensors, arranged, strict=True):
            tensor.take(array)
        self.lengths, self.columns, self._room, self._longest = lengths, columns, longest, longest

    def replace(self, row: int, joining: Batch, longest: int) -> None:
        """Let the only row of ``joining``, which has no more than ``columns`` tokens, take the place of ``row``."""
        self._copy(joining, 0, [tensor.array for tensor in self._tensors], row, self.columns)
        self.lengths[row], self._longest = joining.lengths[0], longest

    def release(self, row: int) -> None:
        """Let ``row`` hold a sequence without tokens. It is still computed in the steps of the others, in vain."""
        self.lengths[row] = 0
        for tensor in self._tensors:
            if tensor.by_token is None:
                tensor.row(tensor.array, row)[...] = 0

    def cache_of(self, row: int) -> list[np.ndarray]:
        """A copy of the cache of a row, one array for each tensor with one row and no padding."""
        length = self.lengths[row]
        arrays = [np.empty(shape_of(tensor, 1, length), np.float32) for tensor in self._model.cache]
        self._copy(self, row, arrays, 0, length)
        return arrays

    def _copy(self, batch: Batch, row: int, arrays: Sequence[np.ndarray], place: int, columns: int) -> None:
        """Copy the cache of a row of ``batch`` to row ``place`` of ``arrays``, whose rows end with column ``columns``."""
        length = batch.lengths[row]
        for tensor, source, array in zip(self._tensors, batch._tensors, arrays, strict=True):
            old, new = tensor.row(source.array, row), tensor.row(array, place)
            if tensor.by_token is None:
                new[...] = old
                continue
            if not tensor.in_place:
                new[: columns - length] = 0  # a masked value that is not finite would still spoil a sum
            new[columns - length : columns] = old[batch.columns - length : batch.columns]


class _Tensor:
    """One tensor of the cache, in memory for two arrays: the cache, and what it becomes."""

    def __init__(self, tensor: Mapping[str, Any]) -> None:
        self.in_place = grows_in_place(tensor)
        self.by_row, self.by_token = axes(tensor)
        self.array = np.empty(shape_of(tensor, 0, 0), np.float32)
        self._tensor = tensor
        self._held, self._free = np.empty(0, np.float32), np.empty(0, np.float32)

    def spare(self, rows: int, columns: int, room: int) -> np.ndarray:
        """An array of ``rows`` with ``columns``, or with ``room`` if it grows in place, in the memory that holds no cache now."""
        needed = prod(shape_of(self._tensor, rows, room))
        if self._free.size < needed:
            self._free = np.empty(needed, np.float32)
        shape = shape_of(self._tensor, rows, room if self.in_place else columns)
        return self._free[: prod(shape)].reshape(shape)

    def take(self, array: np.ndarray) -> None:
        """Make ``array``, which ``spare`` returned, the cache."""
        self.array = array
        self._held, self._free = self._free, self._held

    def row(self, array: np.ndarray, row: int) -> np.ndarray:
        """A row of ``array``, by token if it has tokens."""
        one = np.moveaxis(array, self.by_row, 0)[row]
        return one if self.by_token is None else np.moveaxis(one, self.by_token - (self.by_row < self.by_token), 0)


def fitting_tokens(cache: Sequence[Mapping[str, Any]], rows: int, memory: int) -> int:
    """The most tokens, all rows together, whose cache a scheduler with ``rows`` slots can hold in ``memory`` bytes.

    Every row is held twice, and so is one more sequence, whose prompt is being read.
    """
    states = cache_bytes(cache, rows + 1, 0)
    token = cache_bytes(cache, 1, 1) - cache_bytes(cache, 1, 0)
    room = memory // 2 - states
    return max(0, room * rows // ((rows + 1) * token)) if token else sys.maxsize


def cache_bytes(cache: Sequence[Mapping[str, Any]], rows: int, columns: int) -> int:
    """Bytes of the cache of ``rows`` sequences with ``columns`` tokens each."""
    return sum(4 * prod(shape_of(tensor, rows, columns)) for tensor in cache)
