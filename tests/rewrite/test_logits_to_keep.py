"""The graph input ``logits_to_keep``: its default, and graphs in which it is fixed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from rq_compile.architectures.model import Model
from rq_compile.export.exported import Exported
from rq_compile.rewrite.logits_to_keep import NAME, POSITIONS_AXIS, fixed
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rewrite import exported as as_onnx
from rq_compile.rewrite.rewrite import imported

END = np.iinfo(np.int64).max
X = np.arange(30, dtype=np.float32).reshape(2, 5, 3)


def graph_that_keeps(default: int) -> gs.Graph:
    """Its logits are the last rows of x."""
    x = gs.Variable("x", np.dtype(np.float32), ["batch", "sequence", 3])
    kept = gs.Constant(NAME, np.array([default]))
    logits = gs.Variable("logits", np.dtype(np.float32), ["batch", "kept", 3])
    graph = gs.Graph(inputs=[x, kept], outputs=[logits], opset=21, ir_version=10)
    op = Ops(graph, "test")
    op("Slice", x, op("Neg", kept), [END], [POSITIONS_AXIS], out=logits)
    return graph


def run(graph: gs.Graph, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = as_onnx(graph).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(["logits"], feeds)[0]


@pytest.mark.parametrize("default", [1, 0, 4])
def test_an_input_with_a_default_keeps_it_in_a_rewriting(default: int) -> None:
    graph = imported(as_onnx(graph_that_keeps(default)))
    np.testing.assert_array_equal(run(graph, x=X), X[:, -default:])
    np.testing.assert_array_equal(run(graph, x=X, **{NAME: np.array([2])}), X[:, -2:])


@pytest.mark.parametrize(("count", "positions"), [(1, 1), (3, 3), (0, "sequence")])
def test_fixed(count: int, positions: int | str) -> None:
    graph = imported(as_onnx(graph_that_keeps(1)))
    assert counts_of([fixed(graph, count)]) == {"logits_to_keep inputs fixed": 1}
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    assert graph.outputs[0].shape == ["batch", positions, 3]
    np.testing.assert_array_equal(run(graph, x=X), X[:, -count:])
    assert counts_of([fixed(graph, count)]) == {"logits_to_keep inputs fixed": 0}


def test_exported_graphs_keep_the_last_token_by_default(model: Path, export_once: Callable[[Model], Exported]) -> None:
    graph = export_once(Model.open(model)).model.graph
    assert NAME in {value.name for value in graph.input}
    (default,) = (tensor for tensor in graph.initializer if tensor.name == NAME)
    assert onnx.numpy_helper.to_array(default).tolist() == [1]
