"""The cache of sequences that take their steps together: its memory, and how it grows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from sum_model import CACHE, IN_PLACE, SumModel, answered

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


@pytest.mark.parametrize("cache", [CACHE, IN_PLACE])
def test_a_row_that_is_released_forgets_its_sequence(cache: Sequence[Mapping[str, Any]]) -> None:
    """It is computed in the steps of the others, as a sequence that begins with them."""
    model = SumModel(cache=cache, end_of_text=())
    batch, other = Batch(model), Batch(model)
    for part, token in ((batch, 5), (other, 6)):
        part.begin(12)
        part.step(np.full((1, 4), token))
    batch.arrange([0], [other], 12)
    batch.release(0)
    logits = batch.step(np.array([[7], [6]]))
    assert logits.argmax(1).tolist() == [answered([7], 1, end=None)[0], answered([6] * 5, 1, end=None)[0]]
