"""The cache of sequences that take their steps together.

Sequences of different lengths are aligned at their ends: the cache of a shorter one begins with padding, which the attention mask
excludes. A new token of every sequence is then in the same column, so that a step moves nothing. A sequence that joins takes the
row of one that has left, or a row after the last; where rows are fewer, the last ones move to those that are free.

A tensor that grows in place has room for the columns of further steps, which write only what is new. Other tensors lie in two
arrays: a step reads one and writes the other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import chain
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
        self._reserved = 0  # columns of all rows together for which there may be memory

    def __len__(self) -> int:
        return len(self.lengths)

    def begin(self, longest: int, known: int = 0, cache: Sequence[np.ndarray] = ()) -> None:
        """Become the batch of one sequence of ``known`` tokens with their ``cache``, which will have at most ``longest``."""
        self.lengths, self.columns = [known], known
        self._longest = self._room = self._reserved = longest
        for number, tensor in enumerate(self._tensors):
            tensor.forget()
            array = tensor.spare(1, known, longest)
            if known:
                first_columns(array, tensor.by_token, known)[...] = cache[number]
            elif tensor.by_token is None:
                array[...] = 0
            tensor.take(array)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append ``ids`` int64 ``[rows, new]`` to the rows; logits fp32 ``[rows, vocabulary]`` of the last tokens, valid until
        the next step."""
        rows, new = ids.shape
        if self.columns + new > self._room:
            self._longest = max(self._longest, max(self.lengths) + new)
            self._arrange([(self, row) for row in range(rows)], self._longest)
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

    def arrange(self, keep: Sequence[int], joining: Sequence[Batch], longest: int) -> list[int]:
        """Keep the rows ``keep`` and take in those of the batches ``joining``, of one row each, which are empty afterwards. No
        row will have more than ``longest`` tokens. Returns where each row of the batch was in ``[*keep, *joining]``.

        A row that is kept is copied only if it has to move. A batch that would only take over another one takes its arrays.
        """
        rows = len(keep) + len(joining)
        order = [*range(rows)]
        if not rows:
            self._tensors = [_Tensor(tensor) for tensor in self._model.cache]
            self.lengths, self.columns, self._room, self._reserved = [], 0, 0, 0
        elif not keep and rows == 1:
            (other,) = joining
            self._tensors, other._tensors = other._tensors, self._tensors
            self.lengths, self.columns, self._longest = other.lengths, other.columns, longest
            self._room, self._reserved = other._room, other._reserved
        else:
            places = {row: place for place, row in enumerate(keep)}
            free = chain(range(len(keep), rows), (place for row, place in places.items() if row >= rows))
            order = [places[row] if row in places else next(free) for row in range(rows)]
            sources = [*((self, row) for row in keep), *((batch, 0) for batch in joining)]
            self._arrange([sources[place] for place in order], longest, self._can_stay(joining, rows, longest))
        for batch in joining:
            batch.lengths = []
        return order

    def _can_stay(self, joining: Sequence[Batch], rows: int, longest: int) -> bool:
        """Whether there is memory for ``rows`` in the columns of now, and no reason to remove padding."""
        padded = self.columns >= longest and any(tensor.by_token is not None and not tensor.in_place for tensor in self._tensors)
        fits = self.columns < self._room and rows * self._room <= self._reserved
        return fits and not padded and all(batch.columns <= self.columns for batch in joining)

    def _arrange(self, sources: Sequence[tuple[Batch, int]], longest: int, stay: bool = False) -> None:
        """Let the rows be ``sources``, each a row of a batch; where they ``stay``, in the columns of now."""
        lengths, rows = [batch.lengths[row] for batch, row in sources], len(sources)
        columns, room = (self.columns, self._room) if stay else (max(lengths), longest)
        for number, tensor in enumerate(self._tensors):
            array = tensor.resized(rows, columns, room) if stay else None
            new = tensor.spare(rows, columns, room) if array is None else array
            for place, (batch, row) in enumerate(sources):
                if array is None or (batch, row) != (self, place):
                    tensor.copy(batch._tensors[number].array, row, batch.columns, new, place, columns, lengths[place])
            if array is None:
                tensor.take(new)
            else:
                tensor.array = new
        self.lengths, self.columns, self._room, self._longest = lengths, columns, room, longest
        self._reserved = max(self._reserved, rows * room)

    def cache_of(self, row: int) -> list[np.ndarray]:
        """A copy of the cache of a row, one array for each tensor with one row and no padding."""
        length = self.lengths[row]
        arrays = [np.empty(shape_of(tensor, 1, length), np.float32) for tensor in self._model.cache]
        for tensor, array in zip(self._tensors, arrays, strict=True):
            tensor.copy(tensor.array, row, self.columns, array, 0, length, length)
        return arrays


class _Tensor:
    """One tensor of the cache, in memory for two arrays: the cache, and what it becomes."""

    def __init__(self, tensor: Mapping[str, Any]) -> None:
        self.in_place = grows_in_place(tensor)
        self.by_row, self.by_token = axes(tensor)
        self.array = np.empty(shape_of(tensor, 0, 0), np.float32)
        self._tensor = tensor
        first = [axis for axis in (self.by_row, self.by_token) if axis is not None]
        self._by_row_and_token = [*first, *(axis for axis in range(self.array.ndim) if axis not in first)]
        self._held, self._free = np.empty(0, np.float32), np.empty(0, np.float32)

    def forget(self) -> None:
        """Free the memory of the cache for the next one."""
        if self._held.size > self._free.size:
            self._held, self._free = self._free, self._held

    def spare(self, rows: int, columns: int, room: int) -> np.ndarray:
        """An array of ``rows`` with ``columns``, or with ``room`` if it grows in place, in the memory that holds no cache now."""
        needed = prod(shape_of(self._tensor, rows, room))
        if self._free.size < needed:
            self._free = np.empty(needed, np.float32)
        return self._shaped(self._free, rows, columns, room)

    def take(self, array: np.ndarray) -> None:
        """Make ``array``, which ``spare`` returned, the cache."""
        self.array = array
        self._held, self._free = self._free, self._held

    def resized(self, rows: int, columns: int, room: int) -> np.ndarray | None:
        """The cache with more or fewer rows at its end, in the same memory; None if that is not possible."""
        if self.by_row != 0 or self._held.size < prod(shape_of(self._tensor, rows, room)):
            return None
        return self._shaped(self._held, rows, columns, room)

    def copy(self, old: np.ndarray, row: int, columns: int, new: np.ndarray, place: int, new_columns: int, length: int) -> None:
        """Copy the ``length`` tokens of a row that end with column ``columns`` of ``old`` to row ``place`` of ``new``, where they
        end with column ``new_columns``."""
        source, target = old.transpose(self._by_row_and_token)[row], new.transpose(self._by_row_and_token)[place]
        if self.by_token is None:
            target[...] = source
            return
        if not self.in_place:
            target[: new_columns - length] = 0  # a masked value that is not finite would still spoil a sum
        target[new_columns - length : new_columns] = source[columns - length : columns]

    def _shaped(self, memory: np.ndarray, rows: int, columns: int, room: int) -> np.ndarray:
        shape = shape_of(self._tensor, rows, room if self.in_place else columns)
        return memory[: prod(shape)].reshape(shape)


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
