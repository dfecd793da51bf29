"""Rotations and attention as fused ops: their places in the graph, and their results, compared with float64 or with the ops that
they replace.

test_families.py and test_runtime.py check that the logits of whole models do not change.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from command_line import Run
from fused_graphs import END, cached_feeds, cached_graph, eager_attention, exported_attention, graph_of, ops_of, run, run_all

from rq_compile.rewrite.attention import attention
from rq_compile.rewrite.match import match
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rotary_embeddings import rotary_embeddings
from rq_compile.rewrite.rotated_attention import rotated_attention

FUSED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RotaryEmbedding", "CacheAttention", "CausalMask")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def exported_rotation(
    op: Ops, x: gs.Variable, angle: gs.Variable, dimension: int, *, middle: int, scaling: float = 1.25
) -> gs.Variable:
    both = op("Concat", angle, angle, axis=-1)
    cos, sin = (op("Unsqueeze", op("Mul", op(f, both), np.float32(scaling)), [1]) for f in ("Cos", "Sin"))
    latter, former = op("Slice", x, [middle], [END], [3], [1]), op("Slice", x, [0], [middle], [3], [1])
    return op("Add", op("Mul", x, cos), op("Mul", op("Concat", op("Neg", latter), former, axis=-1), sin))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("positions", [[[0, 1, 2]], [[5, 6, 7], [0, 0, 1]], [[900], [3], [77]]])
def test_a_rotation_at_any_positions(rng: np.random.Generator, positions: list[list[int]], normed: bool) -> None:
    heads, dimension = 3, 8
    graph, op, (x, angle) = graph_of(("x", ["b", "s", heads * dimension]), ("angle", ["b", "s", dimension // 2]))
    by_token = op("Reshape", x, [0, 0, heads, dimension])
    if normed:
        by_token = op("Mul", by_token, np.linspace(1, 2, dimension, dtype=np.float32))
    by_head = op("Transpose", by_token, perm=[0, 2, 1, 3])
    by_head.shape, by_head.dtype = ["b", heads, "s", dimension], np.float32
    y = exported_rotation(op, by_head, angle, dimension, middle=dimension // 2)
    y.dtype, graph.outputs = np.float32, [y]
    rotary_embeddings(graph)
    assert ops_of(graph)["RotaryEmbedding"] == 1
    assert not ops_of(graph)["Neg"]
    angles = np.array(positions, np.float32)[..., None] * np.array([1, 0.1, 0.01, 0.001], np.float32)
    values = rng.standard_normal((*angles.shape[:2], heads, dimension)).astype(np.float32)
    turned = (values * (np.linspace(1, 2, dimension) if normed else 1)).transpose(0, 2, 1, 3)
    a, b = turned[..., :4], turned[..., 4:]
    cos, sin = 1.25 * np.cos(angles.astype(np.float64))[:, None], 1.25 * np.sin(angles.astype(np.float64))[:, None]
    exact = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    found = run(graph, x=values.reshape(*angles.shape[:2], -1), angle=angles)
    np.testing.assert_allclose(found, exact, atol=2e-6)


def test_a_rotation_of_unequal_parts_stays() -> None:
    graph, op, (x, angle) = graph_of(("x", ["b", "s", 16]), ("angle", ["b", "s", 4]))
    by_head = op("Transpose", op("Reshape", x, [0, 0, 2, 8]), perm=[0, 2, 1, 3])
    by_head.shape = ["b", 2, "s", 8]
    graph.outputs = [exported_rotation(op, by_head, angle, 8, middle=3)]
    why = "the halves end at [3] and start at [3] of 8"
    assert counts_of([rotary_embeddings(graph)]) == {"rotations fused": 0, f"rotations not fused: {why}": 1}
    assert ops_of(graph)["Neg"] == 1


def check_fused(rng: np.random.Generator, build: Callable[[], gs.Graph], batch: int, past: int, new: int) -> None:
    graph, plain = build(), build()
    assert counts_of([attention(graph)]) == {"attentions fused": 1}
    found = ops_of(graph)
    assert found["CacheAttention"] == 1
    assert not found["Softmax"] + found["Expand"] + found["Concat"], "keys and values are not copied"
    feeds = cached_feeds(rng, graph, batch, past, new)
    results, expected = run_all(graph, **feeds), run_all(plain, **feeds)
    np.testing.assert_allclose(results[0], expected[0], atol=3e-6)
    for cache, same in zip(results[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(cache, same)


@pytest.mark.parametrize("written", [exported_attention, eager_attention])
@pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 6), (1, 7, 4), (3, 9, 1)])
@pytest.mark.parametrize(("heads", "key_heads", "axis"), [(4, 4, 2), (4, 2, -2), (3, 1, 2)])
def test_attention_appends_to_its_cache(
    rng: np.random.Generator,
    heads: int,
    key_heads: int,
    axis: int,
    batch: int,
    past: int,
    new: int,
    written: Callable[..., gs.Variable],
) -> None:
    check_fused(rng, lambda: cached_graph(heads, key_heads, 8, axis=axis, written=written), batch, past, new)


@pytest.mark.parametrize("form", ["product", "choice"])
@pytest.mark.parametrize("read_as", ["merged", "by_token", "by_head"])
def test_attention_whose_values_are_narrower_than_its_keys(rng: np.random.Generator, form: str, read_as: str) -> None:
    check_fused(rng, lambda: cached_graph(4, 2, 12, 8, form=form, read_as=read_as), 2, 5, 3)


def test_attention_over_a_cache_that_others_read_stays() -> None:
    graph = cached_graph(4, 2, 8)
    op = Ops(graph, "other")
    graph.outputs[1] = op("Slice", graph.outputs[1], [-3], [END], [2], [1])  # a window
    graph.outputs[1].dtype = np.float32
    why = "attentions not fused: its keys are not those of a cache of its own"
    assert counts_of([attention(graph)]) == {"attentions fused": 0, why: 1}
    assert ops_of(graph)["Softmax"] == 1


def test_attention_whose_scores_are_read_by_others_stays() -> None:
    """As that of Granite with windows, which weighs a head by the logarithm of its sum."""
    graph = cached_graph(4, 2, 8, written=eager_attention)
    op = Ops(graph, "other")
    (scores,) = [node.outputs[0] for node in graph.nodes if node.op == "Add"]
    graph.outputs.append(op("ReduceLogSumExp", scores, [-1]))
    graph.outputs[-1].dtype = np.float32
    why = "attentions not fused: its scores are read by ReduceLogSumExp"
    assert counts_of([attention(graph)]) == {"attentions fused": 0, why: 1}


@pytest.mark.parametrize("form", ["excluded", "bias"])
def test_attention_with_another_mask_stays(form: str) -> None:
    graph = cached_graph(4, 2, 8, form=form)
    why = "attentions not fused: its mask is not made of booleans"
    assert counts_of([attention(graph)]) == {"attentions fused": 0, why: 1}


def test_attention_of_a_query_without_a_known_shape_stays() -> None:
    graph = cached_graph(4, 2, 8)
    graph.inputs[0].shape = None
    why = "attentions not fused: its query has the shape None"
    assert counts_of([attention(graph)]) == {"attentions fused": 0, why: 1}


def test_attention_with_a_bias_by_head_stays() -> None:
    graph = cached_graph(2, 2, 8, masks=2)
    assert counts_of([attention(graph)]) == {"attentions fused": 0, "attentions not fused: each head has its own mask": 1}
    assert ops_of(graph)["Softmax"] == 1


def rotated_graph(heads: int = 4, key_heads: int = 2, width: int = 8, sinks: bool = False) -> tuple[gs.Graph, Ops]:
    """CacheAttention of queries and keys that RotaryEmbedding rotates by one table of angles."""
    new = (("query", heads), ("key", key_heads), ("value", key_heads))
    graph, op, tensors = graph_of(
        *((name, ["b", "s", count * width]) for name, count in new),
        *((name, ["b", key_heads, "p", width]) for name in ("past_key", "past_value")),
        *((name, ["t", width // 2]) for name in ("cos", "sin")),
        *([("sinks", [heads])] if sinks else []),
    )
    query, key, value, *past, cos, sin = tensors[:7]
    numbers, allowed = gs.Variable("numbers", np.int64, ["b", "s"]), gs.Variable("allowed", np.bool_, ["b", 1, "s", "t"])
    graph.inputs += [numbers, allowed]
    query, key = (op("RotaryEmbedding", x, numbers, cos, sin, domain="com.microsoft") for x in (query, key))
    operands = (query, key, value, *past, allowed, *tensors[7:])
    y = op("CacheAttention", *operands, num_heads=heads, kv_num_heads=key_heads, scale=0.25, domain="rq.moe")
    caches = [gs.Variable(name) for name in ("keys", "values")]
    y.inputs[0].outputs += caches
    graph.outputs = [y, *caches]
    for tensor in (query, key, *graph.outputs):
        tensor.dtype = np.float32
    return graph, op


@pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 6), (1, 7, 1), (3, 9, 2)])
@pytest.mark.parametrize("sinks", [False, True])
def test_an_attention_rotates_its_queries_and_keys(
    rng: np.random.Generator, batch: int, past: int, new: int, sinks: bool
) -> None:
    (graph, _), (plain, _) = rotated_graph(sinks=sinks), rotated_graph(sinks=sinks)
    assert counts_of([rotated_attention(graph)]) == {"rotated attentions fused": 1}
    assert ops_of(graph) == {"CacheAttention": 1}
    sizes = {"b": batch, "s": new, "p": past, "t": batch * new}
    feeds = {
        tensor.name: rng.standard_normal([sizes.get(size, size) for size in tensor.shape]).astype(np.float32)
        for tensor in graph.inputs[:-2]
    }
    feeds["allowed"] = np.tril(np.ones((new, past + new), bool), past)[None, None].repeat(batch, 0)
    numbers = {"numbers": np.arange(batch * new).reshape(batch, new)}
    results, expected = run_all(graph, **feeds, **numbers), run_all(plain, **feeds, **numbers)
    for found, exact in zip(results, expected, strict=True):
        np.testing.assert_allclose(found, exact, atol=3e-6)


@pytest.mark.parametrize("other", ["angles", "numbers", "a reader", "an output", "no rotation"])
def test_a_rotation_that_an_attention_cannot_do_stays(other: str) -> None:
    graph, op = rotated_graph()
    query, key = (node for node in graph.nodes if node.op == "RotaryEmbedding")
    if other == "angles":
        query.inputs[2], query.inputs[3] = query.inputs[3], query.inputs[2]
    elif other == "numbers":
        query.inputs[1] = op("Neg", query.inputs[1])
    elif other == "a reader":
        graph.outputs.append(op("Neg", key.outputs[0]))
    elif other == "an output":
        graph.outputs.append(query.outputs[0])
    else:
        (attention_node,) = (node for node in graph.nodes if node.op == "CacheAttention")
        attention_node.inputs[0] = query.inputs[0]
    before = ops_of(graph)["RotaryEmbedding"] - (other == "no rotation")
    assert counts_of([rotated_attention(graph)]) == {"rotated attentions fused": 0}
    assert ops_of(graph)["RotaryEmbedding"] == before


def test_a_slice_is_seen_through_only_if_it_keeps_everything() -> None:
    for bounds, seen in (([0], [END], [1], [1]), True), (([0], [END], [1], [2]), False), (([1], [END], [1], [1]), False):
        _, op, (x,) = graph_of(("x", ["b", 8]))
        found = match(op("Neg", op("Slice", x, *bounds)), ("Neg", "y"))
        assert found is not None
        assert (found["y"] is x) == seen


def test_an_engine_has_them_and_the_other_lowerings_do_not(stages: Path, rq_compile: Run, model: Path, tmp_path: Path) -> None:
    for lowering, counts in (("native", (5, 4, 0, 2, 1)), ("stock", (0, 0, 0, 0, 0))):
        path = tmp_path / f"{lowering}.onnx"
        arguments = (model, "--plan", stages / "plan.json", "--lowering", lowering, "-q", "-o", path)
        assert rq_compile(*arguments).exit_code == 0
        found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        assert tuple(found[op] for op in FUSED) == counts
