"""Attention over latents, as it is exported, becomes one op with the same results; what only looks alike stays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from fused_graphs import END, additive, eager_attention, exported_attention, graph_of, ops_of, run_all

from rq_compile.quantization.dense_layout import quantized_parts
from rq_compile.rewrite.cache_lengths import caches_in_place
from rq_compile.rewrite.dense_gemms import DenseWeights
from rq_compile.rewrite.latent_attention import latent_attention
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.weights import ExternalWeight, Section, constant


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(21)


@dataclass(frozen=True)
class Sizes:
    heads: int = 4
    nope: int = 8
    rope: int = 4
    value: int = 12
    rank: int = 6

    @property
    def rows(self) -> int:
        return self.heads * (self.nope + self.value)


def written(op: Ops, whole: gs.Variable, start: int, end: int, part: gs.Variable, width: int) -> gs.Variable:
    """``whole`` with ``part`` as some of its last axis, as slices that are assigned to are exported."""
    last_first = [3, 1, 2, 0]
    places = op("Unsqueeze", op("Slice", op("Range", 0, width, 1), [start], [end], [0], [1]), [-1])
    operands = (op("Transpose", tensor, perm=last_first) for tensor in (whole, part))
    result: gs.Variable = op("Transpose", op("ScatterND", next(operands), places, next(operands)), perm=last_first)
    return result


def latent_graph(
    sizes: Sizes,
    *,
    attention: Callable[..., gs.Variable] = exported_attention,
    narrowed: bool = False,
    swapped: bool = False,
    also: str | None = None,
) -> gs.Graph:
    """Attention whose keys and values are computed from cached latents. ``narrowed``: an indexer excludes further columns.
    ``swapped``: the values come first in the matrix. ``also``: an op that reads the latents, too."""
    heads, nope, rope, value, rank = sizes.heads, sizes.nope, sizes.rope, sizes.value, sizes.rank
    graph, op, (query, latents, positions, new_latents, new_positions) = graph_of(
        ("query", ["b", heads, "s", nope + rope]),
        ("latents", ["b", 1, "p", rank]),
        ("positions", ["b", 1, "p", rope]),
        ("new_latents", ["b", 1, "s", rank]),
        ("new_positions", ["b", 1, "s", rope]),
    )
    masks = [gs.Variable(name, np.bool_, ["b", 1, "s", "t"]) for name in ("allowed", *(["excluded"] if narrowed else []))]
    graph.inputs += masks
    caches = []
    for past, new in ((latents, new_latents), (positions, new_positions)):
        cache = op("Concat", past, new, axis=-2)
        cache.shape, cache.dtype = ["b", 1, "t", past.shape[3]], np.float32
        caches.append(cache)
    weight = constant(ExternalWeight("kv_b", np.dtype(np.float32), (rank, sizes.rows)))
    by_token = op("Reshape", op("MatMul", caches[0], weight), np.array([0, -1, heads, nope + value]))
    splits = [value, nope] if swapped else [nope, value]
    by_head = op("Transpose", by_token, perm=[0, 2, 1, 3])
    parts = op("Split", by_head, splits, axis=3, outputs=2)
    for part, width in zip(parts, splits, strict=True):
        part.shape, part.dtype = ["b", heads, "t", width], np.float32
    first, values = parts[::-1] if swapped else parts
    shared = op("Expand", caches[1], [1, heads, 1, 1])
    shared.shape, shared.dtype = ["b", heads, "t", rope], np.float32
    keys = first
    if rope:
        shape = op("Concat", op("Shape", first, start=0, end=3), [nope + rope], axis=0)
        keys = written(op, op("Cast", op("ConstantOfShape", shape), to=1), 0, nope, first, nope + rope)
    keys = written(op, keys, nope, END, shared, nope + rope)
    keys.shape, keys.dtype = ["b", heads, "t", nope + rope], np.float32
    mask = additive(op, masks[0], "choice")
    if narrowed:
        mask = op("Where", masks[1], np.finfo(np.float32).min, mask)
    y = op("Reshape", op("Transpose", attention(op, query, keys, values, mask), perm=[0, 2, 1, 3]), [0, 0, heads * value])
    graph.outputs = [y, *caches] + ([op(also, caches[0])] if also else [])
    for output in graph.outputs:
        output.dtype = np.float32
    return graph


def dense(values: np.ndarray) -> DenseWeights:
    return DenseWeights(lambda name: values.dtype, lambda name: values)


def with_values(graph: gs.Graph, values: dict[str, np.ndarray]) -> gs.Graph:
    for name, tensor in graph.tensors().items():
        if name in values:
            tensor.values = values[name]
            tensor.data_location = None
    return graph


def computed(sections: list[Section]) -> dict[str, np.ndarray]:
    pieces = [piece for section in sections for piece in section.pieces]
    return {
        weight.name: array.reshape(weight.shape)
        for piece in pieces
        for weight, array in zip(piece.weights, piece.values(), strict=True)
    }


@pytest.mark.parametrize("attention", [exported_attention, eager_attention])
@pytest.mark.parametrize("narrowed", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=2, nope=24, rope=0, value=8, rank=33)])
@pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 6), (1, 7, 4), (3, 9, 1)])
def test_attention_over_latents_is_one_op(
    rng: np.random.Generator,
    attention: Callable[..., gs.Variable],
    narrowed: bool,
    sizes: Sizes,
    batch: int,
    past: int,
    new: int,
) -> None:
    matrix = rng.standard_normal((sizes.rank, sizes.rows)).astype(np.float32)
    graph, plain = (latent_graph(sizes, attention=attention, narrowed=narrowed) for _ in range(2))
    sections, report = latent_attention(graph, "stored", dense(matrix))
    assert counts_of([report]) == {"latent attentions fused": 1}
    found = ops_of(graph)
    assert found["LatentAttention"] == 1
    assert not found["Softmax"] + found["MatMul"] + found["ScatterND"] + found["Concat"]
    assert caches_in_place(gs.export_onnx(graph)) == {"latents", "positions"}
    assert sum(section.bytes for section in sections) == matrix.nbytes
    feeds = feeds_of(rng, graph, batch, past, new)
    results = run_all(with_values(graph, computed(sections)), **feeds)
    expected = run_all(with_values(plain, {"kv_b": matrix}), **feeds)
    np.testing.assert_allclose(results[0], expected[0], atol=2e-5 * np.abs(expected[0]).max())
    for cache, same in zip(results[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(cache, same)


def feeds_of(rng: np.random.Generator, graph: gs.Graph, batch: int, past: int, new: int) -> dict[str, Any]:
    sizes = {"b": batch, "p": past, "s": new, "t": past + new}
    shapes = {tensor.name: [sizes.get(size, size) for size in tensor.shape] for tensor in graph.inputs}
    itself = np.eye(new, past + new, past, dtype=bool)
    allowed = np.tril(np.ones((new, past + new), bool), past)[None, None].repeat(batch, 0)
    allowed[-1, :, :, : (past + new) // 2] = False
    masks = {"allowed": allowed | itself, "excluded": (rng.random(allowed.shape) < 0.4) & ~itself}
    feeds = {
        name: masks[name] if name in masks else rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return feeds


STAYS: dict[str, tuple[Sizes, dict[str, Any], str]] = {
    "latents that others read": (Sizes(), {"also": "Neg"}, "its latents are not those of a cache of its own"),
    "values before keys": (Sizes(), {"swapped": True}, "its values are not beside its keys"),
    "half a panel": (Sizes(heads=2), {}, "its matrix has 40 rows, which do not fill panels of 16"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_looks_alike_stays(case: str) -> None:
    sizes, options, why = STAYS[case]
    graph = latent_graph(sizes, **options)
    sections, report = latent_attention(graph, "stored", dense(np.zeros((sizes.rank, sizes.rows), np.float32)))
    assert counts_of([report]) == {"latent attentions fused": 0, f"latent attentions not fused: {why}": 1}
    assert not sections
    assert ops_of(graph)["Softmax"] == 1


@pytest.mark.parametrize("format", ["fp32", "stored", "int8", "int4"])
def test_the_matrix_has_the_bytes_that_are_predicted(format: Any) -> None:
    sizes = Sizes(rank=100)
    sections, _ = latent_attention(latent_graph(sizes), format, dense(np.zeros((sizes.rank, sizes.rows), np.float16)))
    floats = {"fp32": 4, "stored": 2}
    parts = [floats[format] * sizes.rows * sizes.rank] if format in floats else quantized_parts(sizes.rows, sizes.rank, format)
    assert [weight.bytes for section in sections for weight in section.weights] == list(parts)
