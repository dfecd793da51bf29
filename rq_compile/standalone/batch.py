"""The cache of sequences that take their steps together.

Sequences of different lengths are aligned at their ends: the cache of a shorter one begins with padding, which the attention mask
excludes. A new token of every sequence is then in the same column, so that a step moves nothing. A sequence that is not longer
than the others takes over the row of one that has ended, and nothing else is copied.

The cache lies in two arrays for each of its tensors. A step reads one and writes the other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from .step_model import Steps


class Batch:
    """``lengths``: the tokens of each row in the cache, without padding. ``columns``: with padding, the same for all rows."""

    def __init__(self, model: Steps) -> None:
        self._model = model
        self._buffers: list[list[np.ndarray]] = [[], []]  # for each tensor, flat
        self.past: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.columns = 0
        self._longest = 0  # that the rows may become

    def __len__(self) -> int:
        return len(self.lengths)

    def begin(self, longest: int, known: int = 0, cache: Sequence[np.ndarray] = ()) -> None:
        """Become the batch of one sequence of ``known`` tokens with their ``cache``, which will have at most ``longest``."""
        self.lengths, self._longest = [known], longest
        arrays = self._arrays(1, known)
        for number, array in enumerate(arrays):
            array[...] = cache[number] if known else 0
        self._written(arrays, known)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append ``ids`` int64 ``[rows, new]`` to the rows; logits fp32 ``[rows, vocabulary]`` of the last tokens."""
        rows, new = ids.shape
        lengths, columns = np.array(self.lengths), self.columns + new
        mask = (np.arange(columns) >= columns - new - lengths[:, None]).astype(np.int64)
        positions = lengths[:, None] + np.arange(new)
        present = self._arrays(rows, columns)
        logits = self._model.step(ids, mask, positions, self.past, present)
        self._written(present, columns)
        self.lengths = [length + new for length in self.lengths]
        return logits

    def arrange(self, keep: Sequence[int], joining: Sequence[Batch], longest: int) -> None:
        """Keep the rows ``keep`` and append those of the batches ``joining``. No row will have more than ``longest`` tokens.

        Copies the cache once; a batch that would only take over another one takes its arrays.
        """
        if not keep and not joining:
            self._buffers, self.past, self.lengths, self.columns = [[], []], [], [], 0
            return
        if not keep and len(joining) == 1:
            (other,) = joining
            self._buffers, self.past, self.lengths = other._buffers, other.past, other.lengths
            self.columns, self._longest = other.columns, longest
            return
        sources = [(self, row) for row in keep] + [(batch, row) for batch in joining for row in range(len(batch))]
        lengths = [batch.lengths[row] for batch, row in sources]
        columns, self._longest = max(lengths), longest
        arranged = self._arrays(len(sources), columns)
        for place, (batch, row) in enumerate(sources):
            self._copy(batch, row, arranged, place, columns)
        self._written(arranged, columns)
        self.lengths = lengths

    def replace(self, row: int, joining: Batch, longest: int) -> None:
        """Let the only row of ``joining``, which has no more than ``columns`` tokens, take the place of ``row``."""
        self._copy(joining, 0, self.past, row, self.columns)
        self.lengths[row], self._longest = joining.lengths[0], longest

    def cache_of(self, row: int) -> list[np.ndarray]:
        """A copy of the cache of a row, one array for each tensor with one row and no padding."""
        length = self.lengths[row]
        arrays = [np.empty(shape_of(tensor, 1, length), np.float32) for tensor in self._model.cache]
        self._copy(self, row, arrays, 0, length)
        return arrays

    def _copy(self, batch: Batch, row: int, arrays: Sequence[np.ndarray], place: int, columns: int) -> None:
        """Copy the cache of a row of ``batch`` to row ``place`` of ``arrays``, which have ``columns`` tokens."""
        length = batch.lengths[row]
        for tensor, source, array in zip(self._model.cache, batch.past, arrays, strict=True):
            by_row, by_token = axes(tensor)
            old, new = np.moveaxis(source, by_row, 0)[row], np.moveaxis(array, by_row, 0)[place]
            if by_token is None:
                new[...] = old
                continue
            old, new = (np.moveaxis(one, by_token - (by_row < by_token), 0) for one in (old, new))
            new[: columns - length] = 0  # a masked value that is not finite would still spoil a sum
            new[columns - length :] = old[batch.columns - length :]

    def _arrays(self, rows: int, columns: int) -> list[np.ndarray]:
        """Arrays for the cache of ``rows`` with ``columns`` tokens, in the buffers that hold no cache now."""
        spare = self._buffers[1]
        for number, tensor in enumerate(self._model.cache):
            needed = prod(shape_of(tensor, rows, max(columns, self._longest)))
            if number == len(spare):
                spare.append(np.empty(needed, np.float32))
            elif spare[number].size < needed:
                spare[number] = np.empty(needed, np.float32)
        shapes = [shape_of(tensor, rows, columns) for tensor in self._model.cache]
        return [flat[: prod(shape)].reshape(shape) for flat, shape in zip(spare, shapes, strict=True)]

    def _written(self, arrays: list[np.ndarray], columns: int) -> None:
        self.past, self.columns = arrays, columns
        self._buffers.reverse()


def axes(tensor: Mapping[str, Any]) -> tuple[int, int | None]:
    """The axis of the rows, and that of the tokens; None for a state of a fixed size."""
    shape = tensor["shape"]
    return shape.index("batch"), shape.index("past") if "past" in shape else None


def shape_of(tensor: Mapping[str, Any], rows: int, columns: int) -> list[int]:
    sizes = {"batch": rows, "past": columns}
    return [sizes.get(size, size) for size in tensor["shape"]]


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
