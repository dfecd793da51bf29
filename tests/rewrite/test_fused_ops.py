"""Norms, rotations and attention as ONNX Runtime's fused ops: their places in the graph, and their results, compared with
float64.

test_families.py and test_runtime.py check that the logits of whole models do not change.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from command_line import Run

from rq_compile.rewrite.attention import attention
from rq_compile.rewrite.match import match
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rms_norms import rms_norms
from rq_compile.rewrite.rotary_embeddings import rotary_embeddings

END = np.iinfo(np.int64).max
FUSED = ("SimplifiedLayerNormalization", "RotaryEmbedding", "MultiHeadAttention")


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
    model = gs.export_onnx(graph).SerializeToString()
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


def exported_attention(
    op: Ops,
    query: gs.Variable,
    keys: gs.Variable,
    values: gs.Variable,
    mask: gs.Variable,
    heads: int,
    key_heads: int,
    dimension: int,
    value_dimension: int,
) -> gs.Variable:
    """As torch's exporter writes ``scaled_dot_product_attention``; ``mask`` is 0 or the lowest number."""
    groups = heads // key_heads
    if groups > 1:
        batch, tokens = op("Shape", keys, start=0, end=1), op("Shape", keys, start=2, end=3)
        repeated = op("Concat", batch, [key_heads], [groups], tokens, [dimension], axis=0)
        merged = op("Concat", batch, [heads], tokens, [dimension], axis=0)
        keys, values = (
            op("Reshape", op("Expand", op("Slice", op("Unsqueeze", held, [2]), [0], [END], [3], [1]), repeated), merged)
            for held in (keys, values)
        )
    tokens = op("Shape", keys, start=2, end=3)
    matrices = op("Transpose", op("Reshape", keys, op("Concat", [-1], tokens, [dimension], axis=0)), perm=[0, 2, 1])
    transposed = op("Reshape", matrices, op("Concat", [-1], [heads], [dimension], tokens, axis=0))
    root = np.float32(dimension**-0.25)
    scores = op("Add", op("MatMul", op("Mul", query, root), op("Mul", transposed, root)), mask)
    y = op("MatMul", op("Softmax", scores, axis=-1), values)
    seen = op("ReduceMax", mask, [-1], keepdims=1)
    y = op("Where", op("Less", seen, np.float32(-1)), np.float32(0), y)
    by_token = op("Transpose", op("Reshape", y, [0, heads, -1, value_dimension]), perm=[0, 2, 1, 3])
    by_token.shape, by_token.dtype = ["b", "s", heads, value_dimension], np.float32
    return op("Reshape", by_token, [0, 0, heads * value_dimension])


def attention_graph(heads: int, key_heads: int, dimension: int, value_dimension: int | None = None, masks: int = 1) -> gs.Graph:
    value_dimension = value_dimension or dimension
    graph, op, (query, keys, values, mask) = graph_of(
        ("query", ["b", heads, "s", dimension]),
        ("keys", ["b", key_heads, "t", dimension]),
        ("values", ["b", key_heads, "t", value_dimension]),
        ("mask", ["b", masks, "s", "t"]),
    )
    y = exported_attention(op, query, keys, values, mask, heads, key_heads, dimension, value_dimension)
    y.dtype, graph.outputs = np.float32, [y]
    return graph


@pytest.mark.parametrize("sizes", [(1, 1, 9), (2, 5, 5), (3, 4, 11)])
@pytest.mark.parametrize(("heads", "key_heads", "dimension"), [(4, 4, 8), (4, 2, 8), (6, 2, 5), (3, 1, 16)])
def test_attention(rng: np.random.Generator, heads: int, key_heads: int, dimension: int, sizes: tuple[int, int, int]) -> None:
    batch, sequence, tokens = sizes
    graph = attention_graph(heads, key_heads, dimension)
    attention(graph)
    found = ops_of(graph)
    assert found["MultiHeadAttention"] == 1
    assert not found["Softmax"]
    assert not found["Expand"], "keys and values are not copied"
    assert gs.export_onnx(graph).ir_version == 11, "older runtimes refuse the graph"

    query = rng.standard_normal((batch, heads, sequence, dimension)).astype(np.float32)
    keys, values = rng.standard_normal((2, batch, key_heads, tokens, dimension)).astype(np.float32)
    seen = np.tril(np.ones((sequence, tokens), bool), tokens - sequence)[None, None].repeat(batch, 0)
    seen[-1, :, :, : tokens // 2] = False  # padding on the left; with no past, the first queries see nothing
    mask = np.where(seen, np.float32(0), np.finfo(np.float32).min)
    result = run(graph, query=query, keys=keys, values=values, mask=mask)

    repeated_keys, repeated_values = (held.astype(np.float64).repeat(heads // key_heads, 1) for held in (keys, values))
    scores = query @ repeated_keys.transpose(0, 1, 3, 2) / np.sqrt(dimension)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    exact = (weights @ repeated_values).transpose(0, 2, 1, 3).reshape(batch, sequence, -1)
    np.testing.assert_allclose(result, exact, atol=2e-6)


def cached_graph(heads: int, key_heads: int, dimension: int, *, axis: int = 2, window: bool = False) -> gs.Graph:
    """Attention of new tokens whose keys and values are appended to a cache, which ``window`` cuts before the next step."""
    graph, op, (query, keys, values, new_keys, new_values, mask) = graph_of(
        ("query", ["b", heads, "s", dimension]),
        *((name, ["b", key_heads, "p", dimension]) for name in ("keys", "values")),
        *((name, ["b", "s", key_heads * dimension]) for name in ("new_keys", "new_values")),
        ("mask", ["b", 1, "s", "t"]),
    )
    caches = []
    for past, new in ((keys, new_keys), (values, new_values)):
        by_token = op("Reshape", new, [0, 0, key_heads, dimension])
        caches.append(op("Concat", past, op("Transpose", by_token, perm=[0, 2, 1, 3]), axis=axis))
    y = exported_attention(op, query, caches[0], caches[1], mask, heads, key_heads, dimension, dimension)
    after = [op("Slice", cache, [-3], [END], [2], [1]) for cache in caches] if window else caches
    graph.outputs = [y, *after]
    for output in graph.outputs:
        output.dtype = np.float32
    return graph


@pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 6), (1, 7, 4), (3, 9, 1)])
@pytest.mark.parametrize(("heads", "key_heads", "axis"), [(4, 4, 2), (4, 2, -2), (3, 1, 2)])
def test_attention_appends_to_its_cache(
    rng: np.random.Generator, heads: int, key_heads: int, axis: int, batch: int, past: int, new: int
) -> None:
    dimension = 8
    graph, plain = (cached_graph(heads, key_heads, dimension, axis=axis) for _ in range(2))
    attention(graph)
    assert ops_of(graph)["MultiHeadAttention"] == 1
    held = {node.op for node in graph.nodes if node.outputs[0].name in {output.name for output in graph.outputs}}
    assert "Concat" not in held, "the op appends"
    shapes = {"query": (heads, new), "keys": (key_heads, past), "values": (key_heads, past)}
    feeds = {name: rng.standard_normal((batch, *shape, dimension)).astype(np.float32) for name, shape in shapes.items()}
    for name in ("new_keys", "new_values"):
        feeds[name] = rng.standard_normal((batch, new, key_heads * dimension)).astype(np.float32)
    seen = np.tril(np.ones((new, past + new), bool), past)[None, None].repeat(batch, 0)
    feeds["mask"] = np.where(seen, np.float32(0), np.finfo(np.float32).min)
    found, expected = run_all(graph, **feeds), run_all(plain, **feeds)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
    for cache, same in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(cache, same)


def test_a_cache_that_others_read_is_appended_to_by_a_concat() -> None:
    graph = cached_graph(4, 2, 8, window=True)
    attention(graph)
    assert ops_of(graph)["MultiHeadAttention"] == 1
    assert [output.inputs[0].op for output in graph.outputs[1:]] == ["Slice", "Slice"]


def test_latent_attention_stays() -> None:
    graph = attention_graph(2, 2, 8, value_dimension=6)
    assert counts_of([attention(graph)]) == {"attentions fused": 0, "attentions not fused: heads of 8 have values of 6": 1}
    assert ops_of(graph)["Softmax"] == 1


def test_attention_with_a_bias_by_head_stays() -> None:
    graph = attention_graph(2, 2, 8, masks=2)
    assert counts_of([attention(graph)]) == {"attentions fused": 0, "attentions not fused: each head has its own mask": 1}
    assert ops_of(graph)["Softmax"] == 1


def test_a_slice_is_seen_through_only_if_it_keeps_everything() -> None:
    for bounds, seen in (([0], [END], [1], [1]), True), (([0], [END], [1], [2]), False), (([1], [END], [1], [1]), False):
        _, op, (x,) = graph_of(("x", ["b", 8]))
        found = match(op("Neg", op("Slice", x, *bounds)), ("Neg", "y"))
        assert found is not None
        assert (found["y"] is x) == seen


def test_an_engine_has_them_and_the_other_lowerings_do_not(stages: Path, rq_compile: Run, model: Path, tmp_path: Path) -> None:
    for lowering, counts in (("native", (9, 4, 2)), ("stock", (0, 0, 0))):
        path = tmp_path / f"{lowering}.onnx"
        arguments = (model, "--plan", stages / "plan.json", "--lowering", lowering, "-q", "-o", path)
        assert rq_compile(*arguments).exit_code == 0
        found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        assert tuple(found[op] for op in FUSED) == counts
