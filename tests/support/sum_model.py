"""A model for the scheduler whose answers follow from the tokens by a sum, so that every mixture of requests can be checked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rq_compile.standalone.decoding import grows_in_place

VOCABULARY, END = 97, 96
# Keys, a state of a fixed size, and a cache without heads whose rows are not the first axis.
CACHE: Sequence[Mapping[str, Any]] = (
    {"past": "keys", "present": "keys'", "shape": ["batch", 2, "past", 3]},
    {"past": "state", "present": "state'", "shape": ["batch", 2]},
    {"past": "indexer", "present": "indexer'", "shape": ["past", "batch"]},
)
IN_PLACE: Sequence[Mapping[str, Any]] = ({**CACHE[0], "in_place": True}, *CACHE[1:])
# As most caches: the rows are the first axis of every tensor.
ROWS_FIRST: Sequence[Mapping[str, Any]] = (*IN_PLACE[:2], {**CACHE[2], "shape": ["batch", "past"]})


@dataclass
class SumModel:
    """The next token follows from sums over a sequence's tokens and positions, and from a state that depends on their order."""

    recomputed_beyond: int | None = None
    shares_steps: bool = True
    whole_prompts: bool = False
    reuses_prefixes: bool = True
    failing: set[int] = field(default_factory=set)  # numbers of steps
    steps: list[tuple[int, int]] = field(default_factory=list)  # rows and tokens in the cache
    pieces: list[int] = field(default_factory=list)  # new tokens of each row
    cache: Sequence[Mapping[str, Any]] = CACHE
    vocabulary = VOCABULARY
    end_of_text: Collection[int] = (END,)

    def step(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Sequence[np.ndarray], present: Sequence[np.ndarray]
    ) -> np.ndarray:
        (rows, new), before = ids.shape, mask.shape[1] - ids.shape[1]
        if self.cache[2]["shape"][0] == "batch":
            past, present = [*past[:2], past[2].T], [*present[:2], present[2].T]
        if in_place := grows_in_place(self.cache[0]):
            assert past[0] is present[0]
            assert past[0].shape[2] >= before + new, "there is no room"
            past, present = (
                [keys[:, :, :columns], *others] for (keys, *others), columns in ((past, before), (present, before + new))
            )
        assert [array.shape for array in past] == [(rows, 2, before, 3), (rows, 2), (before, rows)]
        assert [array.shape for array in present] == [(rows, 2, before + new, 3), (rows, 2), (before + new, rows)]
        assert rows == 1 or new == 1, "padding would reach the states"
        np.testing.assert_array_equal(positions[:, -1] + 1, mask.sum(axis=1))
        self.steps.append((rows, before + new))
        self.pieces.append(new)
        if len(self.steps) in self.failing:
            raise RuntimeError("no luck")
        keys, state, indexer = present
        if in_place:
            keys = np.where(mask[:, None, :, None] == 1, keys, 0)  # what is masked may be anything, as it is not read
            present[0][:, :, before:] = (ids * 31 + positions * 7)[:, None, :, None] % 101
        else:
            keys[:, :, :before] = past[0]
        indexer[:before] = past[2]
        keys[:, :, before:] = (ids * 31 + positions * 7)[:, None, :, None] % 101
        indexer[before:] = ids.T
        state[:] = past[1]
        for token in ids.T:
            state[:, 0] = (state[:, 0] * 3 + token) % 89
            state[:, 1] += 1
        np.testing.assert_array_equal(state[:, 1], mask.sum(axis=1))
        sums = np.einsum("bhpd,bp->b", keys, mask) / 6 + np.einsum("pb,bp->b", indexer, mask) + state[:, 0]
        # As in the graph of an engine, masked values take part in the sum, times zero.
        assert np.isfinite(sums).all()
        logits = np.zeros((rows, VOCABULARY), np.float32)
        logits[np.arange(rows), np.round(sums).astype(int) % VOCABULARY] = 1
        return logits


def answered(prompt: Sequence[int], most: int, end: int | None = END) -> list[int]:
    """What SumModel says to ``prompt``."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + most:
        state = 0
        for token in tokens:
            state = (state * 3 + token) % 89
        total = sum((token * 31 + place * 7) % 101 for place, token in enumerate(tokens)) + sum(tokens) + state
        if (following := total % VOCABULARY) == end:
            break
        tokens.append(following)
    return tokens[len(prompt) :]
