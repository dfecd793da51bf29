"""Shapes that are computed from sizes of the batch are read off a tensor that has them."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from fused_graphs import graph_of, ops_of, run

from rq_compile.rewrite.batch_shapes import batch_shapes
from rq_compile.rewrite.report import counts_of


def reshaped(*, shapes: list[Any], count: int = 2, declared: list[Any] | None = None, swapped: bool = False) -> gs.Graph:
    """``count`` times: rows of x become rows again, and the original shape, computed size by size, is given to them. ``shapes``:
    that of x; ``declared``: that of the result."""
    graph, op, (x,) = graph_of(("x", shapes))
    held = op("Neg", x)
    held.shape, held.dtype, y = x.shape, x.dtype, held
    for _ in range(count):
        rows = op("Neg", op("Reshape", y, [-1, 8]))
        sizes = [op("Shape", x, start=axis, end=axis + 1) for axis in ((1, 0) if swapped else (0, 1))]
        y = op("Reshape", rows, op("Concat", *sizes, [8], axis=0))
        y.shape, y.dtype = declared or x.shape, x.dtype
    graph.outputs = [op("Neg", y)]
    graph.outputs[0].dtype = np.float32
    return graph.toposort()


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1), (0, 4)])
def test_one_shape_serves_every_reshape(rng: np.random.Generator, sizes: tuple[int, int]) -> None:
    graph = reshaped(shapes=["b", "s", 8])
    assert counts_of([batch_shapes(graph)]) == {"computed shapes read off another tensor": 2}
    assert ops_of(graph) == {"Neg": 4, "Reshape": 4, "Shape": 1}
    x = rng.standard_normal((*sizes, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(graph, x=x), x)


@pytest.mark.parametrize(
    "built",
    [
        reshaped(shapes=["b", "s", 8], declared=["s", "b", 8], swapped=True, count=1),
        reshaped(shapes=["b", "s", 8], declared=["b", None, 8], count=1),
        reshaped(shapes=["b", 3, 8], count=1),
    ],
    ids=["another shape", "an unknown size", "one size that depends on the batch"],
)
def test_other_shapes_stay(built: gs.Graph) -> None:
    before = ops_of(built)
    assert counts_of([batch_shapes(built)]) == {"computed shapes read off another tensor": 0}
    assert ops_of(built) == before


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)
