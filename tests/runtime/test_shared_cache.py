"""The cache of sequences that take their steps together: its memory, and how it grows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from sum_model import CACHE, IN_PLACE, ROWS_FIRST, SumModel, answered

from rq_compile.standalone.batch import Batch, cache_bytes

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("cache", [CACHE, IN_PLACE])
def test_the_arrays_of_a_batch_are_those_of_its_longest_rows_and_are_given_back(cache: Sequence[Mapping[str, Any]]) -> None:
    model = SumModel(cache=cache)
    batch, parts = Batch(model), []
    for length, longest in ((3, 10), (5, 7)):
        parts.append(Batch(model))
        parts[-1].begin(longest)
        parts[-1].step(np.ones((1, length), np.int64))
    batch.arrange([], parts, 10)
    batch.step(np.ones((2, 1), np.int64))
    assert held(batch) <= 2 * cache_bytes(CACHE, rows=2, columns=10)
    batch.arrange([], [], 0)
    assert held(batch) == 0


def held(batch: Batch) -> int:
    return sum(tensor._held.nbytes + tensor._free.nbytes for tensor in batch._tensors)


def test_a_cache_in_place_stays_where_it_is_until_there_is_no_room() -> None:
    model = SumModel(cache=IN_PLACE, end_of_text=())
    batch, one = Batch(model), Batch(model)
    for part, length in ((batch, 4), (one, 2)):
        part.begin(12)
        part.step(np.ones((1, length), np.int64))
    batch.arrange([0], [one], 12)
    (keys, *_), places = [tensor.array for tensor in batch._tensors], []
    for _ in range(10):
        batch.step(np.ones((2, 1), np.int64))
        places.append(batch._tensors[0].array is keys)
    assert places == [True] * 8 + [False] * 2, "12 columns, of which the longer prompt takes 4"
    assert batch.lengths == [14, 12]


@pytest.mark.parametrize("cache", [CACHE, IN_PLACE, ROWS_FIRST])
def test_rows_leave_and_join_in_any_place(cache: Sequence[Mapping[str, Any]]) -> None:
    """The rows that stay have the same next tokens, and only those whose place another one needs are copied."""
    model = SumModel(cache=cache, end_of_text=())
    batch = Batch(model)

    def one(token: int, length: int = 4) -> Batch:
        alone = Batch(model)
        alone.begin(20)
        alone.step(np.full((1, length), token))
        return alone

    def said(*tokens: int) -> list[int]:
        return batch.step(np.array(tokens)[:, None]).argmax(1).tolist()

    def expected(token: int, length: int) -> int:
        return answered([token] * length, 1, end=None)[0]

    assert batch.arrange([], [one(token) for token in (5, 6, 7, 8)], 20) == [0, 1, 2, 3]
    assert said(5, 6, 7, 8) == [expected(token, 5) for token in (5, 6, 7, 8)]
    arrays = [tensor.array for tensor in batch._tensors]
    assert batch.arrange([1, 3], [], 20) == [1, 0], "the last row takes the place of the first one"
    assert said(8, 6) == [expected(8, 6), expected(6, 6)]
    assert batch.arrange([1], [one(9), one(3)], 20) == [1, 0, 2], "those who join take what is free, and places at the end"
    assert batch.lengths == [4, 6, 4]
    assert said(9, 6, 3) == [expected(9, 5), expected(6, 7), expected(3, 5)]
    in_place = [tensor for tensor in batch._tensors if tensor.in_place]
    assert all(np.shares_memory(tensor.array, array) for tensor, array in zip(in_place, arrays, strict=False))
    assert batch.arrange([0, 1, 2], [one(4, 12)], 20) == [0, 1, 2, 3], "it has more tokens than the columns of the others"
    assert said(9, 6, 3, 4) == [expected(9, 6), expected(6, 8), expected(3, 6), expected(4, 13)]
