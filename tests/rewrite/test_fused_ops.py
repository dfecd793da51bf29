"""Norms, rotations and attention as fused ops: their places in the graph, and their results, compared with float64 or with the
ops that they replace.

test_families.py and test_runtime.py check that the logits of whole models do not change.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from command_line import Run

from rq_compile.engine.library import library_path
from rq_compile.rewrite.attention import attention
from rq_compile.rewrite.cache_lengths import cache_lengths, caches_in_place
from rq_compile.rewrite.match import match
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.residual_norms import residual_norms
from rq_compile.rewrite.rewrite import exported
from rq_compile.rewrite.rms_norms import rms_norms
from rq_compile.rewrite.rotary_embeddings import rotary_embeddings
from rq_compile.rewrite.same_shapes import same_shapes

END = np.iinfo(np.int64).max
FUSED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RotaryEmbedding", "CacheAttention", "CausalMask")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def graph_of(*inputs: Any) -> tuple[gs.Graph, Ops, list[gs.Variable]]:
    """An empty graph whose inputs are (name, shape), all fp32."""
    tensors = [gs.Variable(name, np.float32, shape) for name, shape in inputs]
    graph = gs.Graph(inputs=tensors, opset=21, ir_version=10)
    return graph, Ops(graph, "test"), tensors


def ops_of(graph: gs.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def run(graph: gs.Graph, **feeds: np.ndarray) -> np.ndarray:
    return run_all(graph, **feeds)[0]


def run_all(graph: gs.Graph, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library_path()))
    model = exported(graph).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def exported_norm(
    op: Ops, x: gs.Variable, weight: Any, *, exponent: float = 2.0, axis: int = -1, epsilon: float = 1e-5
) -> gs.Variable:
    mean = op("ReduceMean", op("Pow", x, np.float32(exponent)), [axis], keepdims=1)
    return op("Mul", weight, op("Mul", x, op("Reciprocal", op("Sqrt", op("Add", mean, np.float32(epsilon))))))


@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 7, 65), (2, 0, 8)])
def test_a_norm(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    graph, op, (x,) = graph_of(("x", ["b", "s", shape[-1]]))
    weight = rng.standard_normal(shape[-1]).astype(np.float32)
    y = exported_norm(op, x, weight)
    y.dtype, graph.outputs = np.float32, [y]
    assert counts_of([rms_norms(graph)]) == {"norms fused": 1}
    assert ops_of(graph) == {"SimplifiedLayerNormalization": 1}
    values = (3 * rng.standard_normal(shape)).astype(np.float32)
    exact = values.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(run(graph, x=values), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("other", "why"), [({"exponent": 3.0}, "exponent [3.0]"), ({"axis": 1}, "axes [1]"), ({"exponent": 0.5}, "exponent [0.5]")]
)
def test_what_is_no_norm_stays(other: dict[str, Any], why: str) -> None:
    graph, op, (x,) = graph_of(("x", ["b", "s", 8]))
    graph.outputs = [exported_norm(op, x, np.ones(8, np.float32), **other)]
    assert counts_of([rms_norms(graph)]) == {"norms fused": 0, f"norms not fused: {why}": 1}
    assert ops_of(graph)["Pow"] == 1


def residual_graph(shape: list[Any], *others: list[Any], kept: bool = True, norms: int = 1) -> gs.Graph:
    """Norms of the sum of two tensors of ``shape``, or of ``others``; ``kept``: the sum is read by another node, too."""
    shapes = others or (shape, shape)
    graph, op, (a, b) = graph_of(*zip("ab", shapes, strict=True))
    total = op("Add", a, b)
    total.shape, total.dtype = shape, np.float32
    y = [exported_norm(op, total, np.linspace(1, 2 + n, shape[-1], dtype=np.float32)) for n in range(norms)]
    graph.outputs = [*y, op("Neg", total)] if kept else y
    for output in graph.outputs:
        output.dtype = np.float32
    rms_norms(graph)
    return graph


@pytest.mark.parametrize("sizes", [(1, 1, 32), (3, 7, 65), (2, 0, 8)])
@pytest.mark.parametrize("kept", [False, True])
def test_a_norm_of_a_residual_sum(rng: np.random.Generator, sizes: tuple[int, ...], kept: bool) -> None:
    graph = residual_graph(["b", "s", sizes[-1]], kept=kept)
    assert counts_of([residual_norms(graph)]) == {"residual sums fused with norms": 1}
    assert ops_of(graph) == Counter({"SkipSimplifiedLayerNormalization": 1, **({"Neg": 1} if kept else {})})
    a, b = (rng.standard_normal(sizes).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) + b
    y, *negative = run_all(graph, a=a, b=b)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.linspace(1, 2, sizes[-1])
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
    for sums in negative:
        np.testing.assert_array_equal(-sums, a + b)


def test_two_norms_of_a_residual_sum(rng: np.random.Generator) -> None:
    """One takes the sum, the other reads it."""
    graph, plain = (residual_graph(["b", "s", 16], norms=2, kept=False) for _ in range(2))
    assert counts_of([residual_norms(graph)]) == {"residual sums fused with norms": 1}
    feeds = {name: rng.standard_normal((2, 3, 16)).astype(np.float32) for name in "ab"}
    for found, expected in zip(run_all(graph, **feeds), run_all(plain, **feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_a_norm_of_a_sum_with_a_vector_or_with_unknown_shapes_stays() -> None:
    for shapes in ((["b", "s", 16], ["b", "s", 16], [16]), (["b", "s", 16], ["b", 1, 16], ["b", "s", 16]), (["b", 16],)):
        graph = residual_graph(*shapes)
        assert counts_of([residual_norms(graph)]) == {"residual sums fused with norms": 0}
        assert ops_of(graph)["Add"] == 1
    graph = residual_graph(["b", "s", 16])
    graph.inputs[0].shape = None
    assert counts_of([residual_norms(graph)]) == {"residual sums fused with norms": 0}


def reshaped(before: list[Any], after: list[Any] | None, shape: list[int], output: bool = False) -> gs.Graph:
    graph, op, (x,) = graph_of(("x", before))
    y = op("Reshape", op("Neg", x), shape)
    y.inputs[0].inputs[0].shape, y.shape = before, after
    graph.outputs = [y if output else op("Abs", y)]
    for node in graph.nodes:
        node.outputs[0].dtype = np.float32
    return graph


def test_a_reshape_to_the_same_shape_is_removed(rng: np.random.Generator) -> None:
    for sizes, shape in ((["b", "s", 8], [0, 0, 8]), (["b*s", 8], [-1, 8])):
        graph = reshaped(sizes, sizes, shape)
        assert counts_of([same_shapes(graph)]) == {"reshapes to the same shape removed": 1}
        assert ops_of(graph) == {"Neg": 1, "Abs": 1}
        x = rng.standard_normal((3, 2, 8)[-len(sizes) :]).astype(np.float32)
        np.testing.assert_array_equal(run(graph, x=x), np.abs(x))


def test_other_reshapes_stay() -> None:
    for before, after, shape in (
        (["b", "s", 8], ["b*s", 8], [-1, 8]),
        (["b", "s"], ["s", "b"], [-1, 3]),
        (["b", None], ["b", None], [3, -1]),
        (["b", "s"], None, [3, -1]),
    ):
        graph = reshaped(before, after, shape)
        assert counts_of([same_shapes(graph)]) == {"reshapes to the same shape removed": 0}
        assert ops_of(graph)["Reshape"] == 1
    assert counts_of([same_shapes(reshaped([4, 2], [4, 2], [4, 2], output=True))]) == {"reshapes to the same shape removed": 0}


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


def additive(op: Ops, allowed: gs.Variable, form: str = "product") -> gs.Variable:
    """A mask of 0 and the lowest number, in the two ways in which it is exported, and masks that look like it."""
    lowest = np.finfo(np.float32).min
    if form == "product":
        return op("Mul", op("Cast", op("Not", allowed), to=1), lowest)
    if form == "choice":
        return op("Where", allowed, np.float32(0), lowest)
    if form == "excluded":  # what another exporter might write: the booleans say what is not read
        return op("Where", allowed, lowest, np.float32(0))
    return op("Mul", op("Cast", op("Not", allowed), to=1), np.float32(-1))  # a bias


def repeated(op: Ops, held: gs.Variable, heads: int) -> gs.Variable:
    _, key_heads, _, dimension = held.shape
    if key_heads == heads:
        return held
    batch, tokens = op("Shape", held, start=0, end=1), op("Shape", held, start=2, end=3)
    shape = op("Concat", batch, [key_heads], [heads // key_heads], tokens, [dimension], axis=0)
    merged = op("Concat", batch, [heads], tokens, [dimension], axis=0)
    return op("Reshape", op("Expand", op("Slice", op("Unsqueeze", held, [2]), [0], [END], [3], [1]), shape), merged)


def exported_attention(op: Ops, query: gs.Variable, keys: gs.Variable, values: gs.Variable, mask: gs.Variable) -> gs.Variable:
    """As torch's exporter writes ``scaled_dot_product_attention``, before the heads are swapped back."""
    _, heads, _, dimension = query.shape
    keys, values = repeated(op, keys, heads), repeated(op, values, heads)
    tokens = op("Shape", keys, start=2, end=3)
    matrices = op("Transpose", op("Reshape", keys, op("Concat", [-1], tokens, [dimension], axis=0)), perm=[0, 2, 1])
    transposed = op("Reshape", matrices, op("Concat", [-1], [heads], [dimension], tokens, axis=0))
    root = np.float32(dimension**-0.25)
    scores = op("Add", op("MatMul", op("Mul", query, root), op("Mul", transposed, root)), mask)
    y = op("MatMul", op("Softmax", scores, axis=-1), values)
    nothing = op("Less", op("ReduceMax", mask, [-1], keepdims=1), np.float32(-1))
    return op("Reshape", op("Where", nothing, np.float32(0), y), op("Shape", y))


def eager_attention(op: Ops, query: gs.Variable, keys: gs.Variable, values: gs.Variable, mask: gs.Variable) -> gs.Variable:
    """As transformers' own attention with a sink for each head is exported."""
    _, heads, _, dimension = query.shape
    keys, values = repeated(op, keys, heads), repeated(op, values, heads)
    products = op("MatMul", query, op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = op("Add", op("Mul", products, np.float32(dimension**-0.5)), mask)
    shape = op("Concat", op("Shape", scores, start=0, end=3), [1], axis=0)
    sinks = op("Expand", np.linspace(-1, 2, heads, dtype=np.float32).reshape(1, -1, 1, 1), shape)
    joined = op("Concat", scores, sinks, axis=-1)
    weights = op("Softmax", op("Sub", joined, op("ReduceMax", joined, [-1], keepdims=1)), axis=-1)
    return op("MatMul", op("Slice", op("Cast", weights, to=1), [0], [-1], [3], [1]), values)


def cached_graph(
    heads: int,
    key_heads: int,
    dimension: int,
    value_dimension: int | None = None,
    *,
    axis: int = 2,
    masks: int = 1,
    form: str = "product",
    read_as: str = "merged",
    written: Callable[..., gs.Variable] = exported_attention,
) -> gs.Graph:
    """Attention of new tokens whose keys and values are appended to a cache. ``read_as``: how the heads are read."""
    sizes = {"keys": dimension, "values": value_dimension or dimension}
    graph, op, (query, keys, values, new_keys, new_values) = graph_of(
        ("query", ["b", heads, "s", dimension]),
        *((name, ["b", key_heads, "p", size]) for name, size in sizes.items()),
        *((f"new_{name}", ["b", "s", key_heads * size]) for name, size in sizes.items()),
    )
    allowed = gs.Variable("allowed", np.bool_, ["b", masks, "s", "t"])
    graph.inputs.append(allowed)
    caches = []
    for past, new in ((keys, new_keys), (values, new_values)):
        by_token = op("Reshape", new, [0, 0, key_heads, past.shape[3]])
        cache = op("Concat", past, op("Transpose", by_token, perm=[0, 2, 1, 3]), axis=axis)
        cache.shape = ["b", key_heads, "t", past.shape[3]]
        caches.append(cache)
    graph.outputs = caches
    y = written(op, query, *caches, additive(op, allowed, form))
    by_token = op("Transpose", y, perm=[0, 2, 1, 3])
    if read_as == "by_head":
        graph.outputs = [op("Mul", y, np.float32(2)), *caches]
    elif read_as == "by_token":
        graph.outputs = [op("Mul", by_token, np.float32(2)), *caches]
    else:
        graph.outputs = [op("Reshape", by_token, [0, 0, heads * sizes["values"]]), *caches]
    for output in graph.outputs:
        output.dtype = np.float32
    return graph


def cached_feeds(rng: np.random.Generator, graph: gs.Graph, batch: int, past: int, new: int) -> dict[str, np.ndarray]:
    sizes = {"b": batch, "p": past, "s": new}
    shapes = {tensor.name: [sizes.get(size, size) for size in tensor.shape] for tensor in graph.inputs[:-1]}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    seen = np.tril(np.ones((new, past + new), bool), past)[None, None].repeat(batch, 0)
    seen[-1, :, :, : (past + new) // 2] = False  # padding on the left; without a past, the first queries may read nothing
    return {**feeds, "allowed": seen.repeat(graph.inputs[-1].shape[1], 1)}


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


def test_a_slice_is_seen_through_only_if_it_keeps_everything() -> None:
    for bounds, seen in (([0], [END], [1], [1]), True), (([0], [END], [1], [2]), False), (([1], [END], [1], [1]), False):
        _, op, (x,) = graph_of(("x", ["b", 8]))
        found = match(op("Neg", op("Slice", x, *bounds)), ("Neg", "y"))
        assert found is not None
        assert (found["y"] is x) == seen


def test_an_engine_has_them_and_the_other_lowerings_do_not(stages: Path, rq_compile: Run, model: Path, tmp_path: Path) -> None:
    for lowering, counts in (("native", (5, 4, 4, 2, 1)), ("stock", (0, 0, 0, 0, 0))):
        path = tmp_path / f"{lowering}.onnx"
        arguments = (model, "--plan", stages / "plan.json", "--lowering", lowering, "-q", "-o", path)
        assert rq_compile(*arguments).exit_code == 0
        found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        assert tuple(found[op] for op in FUSED) == counts
