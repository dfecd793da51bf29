"""Norms, residual sums and reshapes to the same shape: which are fused or removed, and the results, compared with float64."""

from collections import Counter
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from fused_graphs import graph_of, ops_of, run, run_all

from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.residual_norms import residual_norms
from rq_compile.rewrite.rms_norms import rms_norms
from rq_compile.rewrite.same_shapes import same_shapes


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


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
