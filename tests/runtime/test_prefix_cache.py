"""The caches of ended sequences, and which beginning of a prompt they know."""

from collections.abc import Sequence

import numpy as np
import pytest

from rq_compile.standalone.prefix_cache import PrefixCache

pytestmark = pytest.mark.quick

KEYS = {"past": "keys", "present": "keys'", "shape": ["batch", 2, "past", 3]}
INDEXER = {"past": "indexer", "present": "indexer'", "shape": ["past", "batch"]}
STATE = {"past": "state", "present": "state'", "shape": ["batch", 5]}


def keys(tokens: Sequence[int]) -> list[np.ndarray]:
    """A cache of KEYS and INDEXER, from which the tokens can be read: 28 bytes for each."""
    column = np.array(tokens, np.float32)
    return [np.broadcast_to(column[:, None], (1, 2, len(tokens), 3)).copy(), column[:, None].copy()]


def state(tokens: Sequence[int]) -> list[np.ndarray]:
    return [np.full((1, 5), sum(tokens), np.float32)]


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ([1, 2, 3, 4, 9], 4),
        ([1, 2, 3, 4], 3),  # the last token is always read
        ([1, 2, 3], 2),
        ([1, 2, 9, 4, 5], 2),
        ([1], 0),
        ([9, 2, 3, 4], 0),
        ([7, 8, 7, 8], 3),
        ([7, 8, 7, 7, 7], 3),
    ],
)
def test_the_longest_known_beginning(prompt: list[int], known: int) -> None:
    cache = PrefixCache([KEYS, INDEXER], 10_000)
    for tokens in ([1, 2, 3, 4], [7, 8, 7], [1, 5]):
        cache.keep(tokens, keys(tokens))
    count, arrays = cache.longest(prompt)
    assert count == known
    for array, expected in zip(arrays, keys(prompt[:known]), strict=known > 0):
        np.testing.assert_array_equal(array, expected)
        assert array.flags.c_contiguous


@pytest.mark.parametrize(("prompt", "known"), [([1, 2, 3, 9], 3), ([1, 2, 3], 2), ([1, 2, 9, 9], 2), ([1, 9, 9], 0), ([1, 2], 0)])
def test_a_state_belongs_to_a_whole_sequence(prompt: list[int], known: int) -> None:
    """Here, that of 1, 2 and that of 1, 2, 3."""
    cache = PrefixCache([KEYS, INDEXER, STATE], 10_000)
    for tokens in ([1, 2], [1, 2, 3]):
        cache.keep(tokens, [*keys(tokens), *state(tokens)])
    count, arrays = cache.longest(prompt)
    assert count == known
    for array, expected in zip(arrays, [*keys(prompt[:known]), *state(prompt[:known])], strict=known > 0):
        np.testing.assert_array_equal(array, expected)


def test_the_least_recently_used_leaves_first() -> None:
    cache = PrefixCache([KEYS, INDEXER], 28 * 10)
    for first in (1, 2, 3):
        cache.keep([first] * 3, keys([first] * 3))
    assert cache.longest([1] * 4)[0] == 3
    cache.keep([4] * 3, keys([4] * 3))
    assert [cache.longest([first] * 4)[0] for first in (1, 2, 3, 4)] == [3, 0, 3, 3]
    cache.keep([5] * 11, keys([5] * 11))  # larger than all together may be
    assert [cache.longest([first] * 4)[0] for first in (1, 3, 4, 5)] == [3, 3, 3, 0]
    cache.keep([], keys([]))
    assert cache.longest([]) == (0, [])


def test_a_longer_sequence_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache([KEYS, INDEXER], 28 * 10)
    cache.keep([6] * 3, keys([6] * 3))
    for length in range(1, 8):
        cache.keep([1] * length, keys([1] * length))
    assert [cache.longest([token] * 9)[0] for token in (1, 6)] == [7, 3]


def test_no_room_keeps_nothing() -> None:
    cache = PrefixCache([KEYS, INDEXER], 0)
    cache.keep([1, 2], keys([1, 2]))
    assert cache.longest([1, 2, 3]) == (0, [])
