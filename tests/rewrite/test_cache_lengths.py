"""Lengths of caches that are read off the attention mask, so that a cache may have room for further tokens."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from fused_graphs import cached_feeds, cached_graph, run_all

from rq_compile.rewrite.attention import attention
from rq_compile.rewrite.cache_lengths import cache_lengths, caches_in_place
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def graph_with_lengths(*others: str) -> gs.Graph:
    """Attention over a cache whose shape says how many tokens it holds; ``others``: ops that read it, too."""
    graph = cached_graph(4, 2, 8)
    keys, op = graph.inputs[1], Ops(graph, "others")
    before, after = (op("Add", op("Shape", cache, start=2, end=3), [0]) for cache in (keys, graph.outputs[2]))
    graph.outputs += [before, after, *(op(other, keys) for other in others)]
    names = (("attention_mask", ["b", "t"]), ("input_ids", ["b", "s"]))
    graph.inputs = [*graph.inputs[:-1], *(gs.Variable(name, np.int64, shape) for name, shape in names), graph.inputs[-1]]
    for output in graph.outputs:
        output.dtype = output.dtype or np.float32
    before.dtype = after.dtype = np.int64
    return graph


def test_the_other_sizes_of_a_cache_are_its_own() -> None:
    graph = graph_with_lengths()
    keys, op = graph.inputs[1], Ops(graph, "sizes")
    graph.outputs += [op("Add", op("Shape", keys, start=0, end=1), [0]), op("Add", op("Shape", keys, start=-1), [0])]
    for output in graph.outputs[-2:]:
        output.dtype = np.int64
    attention(graph)
    assert counts_of([cache_lengths(graph)]) == {"lengths of caches read off the mask": 2}
    assert caches_in_place(gs.export_onnx(graph)) == {"keys", "values"}


def test_the_shape_of_a_cache_as_a_whole_leaves_it_as_it_is() -> None:
    graph = graph_with_lengths("Shape")
    graph.outputs[-1].dtype = np.int64
    attention(graph)
    why = "lengths of caches not read off the mask: keys or its values are read by Shape"
    assert counts_of([cache_lengths(graph)]) == {"lengths of caches read off the mask": 0, why: 1}
    assert caches_in_place(gs.export_onnx(graph)) == set()


@pytest.mark.parametrize("room", [0, 5])
def test_the_length_of_a_cache_is_read_off_the_mask(rng: np.random.Generator, room: int) -> None:
    """With room for further tokens, which may hold anything, the results are those of a cache without."""
    graph = graph_with_lengths()
    attention(graph)
    assert counts_of([cache_lengths(graph)]) == {"lengths of caches read off the mask": 2}
    assert caches_in_place(gs.export_onnx(graph)) == {"keys", "values"}
    feeds = cached_feeds(rng, cached_graph(4, 2, 8), 2, 6, 1)
    expected = run_all(cached_graph(4, 2, 8), **feeds)
    feeds |= {"attention_mask": np.ones((2, 7), np.int64), "input_ids": np.zeros((2, 1), np.int64)}
    for name in ("keys", "values") if room else ():
        feeds[name] = np.concatenate([feeds[name], np.full((2, 2, room, 8), np.nan, np.float32)], 2)
    y, *caches, before, after = run_all(graph, **feeds)
    np.testing.assert_allclose(y, expected[0], atol=3e-6)
    for cache, same in zip(caches, expected[1:], strict=True):
        np.testing.assert_array_equal(cache[:, :, :7], same)
    assert (before.tolist(), after.tolist()) == ([6], [7])


def test_the_length_of_a_cache_that_others_read_is_its_shape() -> None:
    graph = graph_with_lengths("Neg", "Size")
    attention(graph)
    why = "lengths of caches not read off the mask: keys or its values are read by Neg, Size"
    assert counts_of([cache_lengths(graph)]) == {"lengths of caches read off the mask": 0, why: 1}
    assert caches_in_place(gs.export_onnx(graph)) == set(), "keys and values have the same number of columns"
