"""Which masks become CausalMask, and that every engine's mask stays the same, bit for bit.

The masks of the model types, and how many of them are fused, are in tests/support/pass_counts.json.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from rq_compile.engine.library import library_path
from rq_compile.rewrite.causal_masks import causal_masks
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rewrite import exported

ANOTHER = {"causal masks fused": 0, "causal masks not fused: it is another function of the attention mask": 1}


class Sketch:
    """A graph whose output is computed from a mask: ``column`` int64 [tokens], ``row`` int64 [sequence, 1] (the number of its
    column), ``read`` bool [batch, 1, 1, tokens]."""

    def __init__(self, length_of: str = "past") -> None:
        inputs = (("attention_mask", "tokens"), ("input_ids", "sequence"), ("position_ids", "sequence"))
        tensors = [gs.Variable(name, np.int64, ["batch", size]) for name, size in inputs]
        tensors.append(gs.Variable("past_key_values.0.key", np.float32, ["batch", 2, "past", 8]))
        self.graph = gs.Graph(inputs=tensors, opset=21, ir_version=10)
        self.op = op = Ops(self.graph, "mask")
        self.attention_mask, self.input_ids, self.position_ids, cache = tensors
        self.steps = op("Squeeze", op("Shape", self.input_ids, start=1, end=2), [0])
        self.total = op("Squeeze", op("Shape", self.attention_mask, start=1), [0])
        past = op("Squeeze", op("Shape", cache, start=2, end=3), [0])
        first = past if length_of == "past" else op("Sub", self.total, self.steps)
        self.column = op("Range", 0, op("Add", first, self.steps), 1)
        self.row = op("Unsqueeze", op("Add", op("Range", 0, self.steps, 1), first), [1])
        self.read = op("Unsqueeze", op("Cast", self.attention_mask, to=9), [1, 2])
        self.causal = op("LessOrEqual", self.column, self.row)

    def of(self, *conditions: gs.Tensor) -> gs.Graph:
        """Their conjunction, as a mask that a node reads which also reads the cache."""
        mask = conditions[0]
        for condition in conditions[1:]:
            mask = self.op("And", mask, condition)
            mask.dtype, mask.shape = np.dtype(bool), ["batch", 1, "sequence", "tokens"]
        of_cache = self.op("ReduceSum", self.graph.inputs[3], keepdims=0)
        out = self.op("Where", mask, self.op("Add", of_cache, np.float32(2)), np.float32(-1))
        out.dtype = np.float32
        self.graph.outputs.append(out)
        self.graph.cleanup().toposort()
        return self.graph


def causal(sketch: Sketch) -> gs.Graph:
    return sketch.of(sketch.causal, sketch.read)


def in_a_window(window: int) -> Callable[[Sketch], gs.Graph]:
    def build(sketch: Sketch) -> gs.Graph:
        near = sketch.op("Greater", sketch.column, sketch.op("Sub", sketch.row, np.int64(window)))
        return sketch.of(near, sketch.causal, sketch.read)

    return build


def run(graph: gs.Graph, attention_mask: np.ndarray, steps: int) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(exported(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch, tokens = attention_mask.shape
    feeds = {
        "attention_mask": attention_mask,
        "input_ids": np.ones((batch, steps), np.int64),
        "position_ids": np.ones((batch, steps), np.int64),
        "past_key_values.0.key": np.zeros((batch, 2, tokens - steps, 8), np.float32),
    }
    (result,) = session.run(None, {tensor.name: feeds[tensor.name] for tensor in graph.inputs})
    return result


@pytest.mark.parametrize("length_of", ["past", "total"])
@pytest.mark.parametrize(("build", "window"), [(causal, -1), *((in_a_window(window), window) for window in (1, 2, 8, 100, 4096))])
def test_a_causal_mask_is_one_node(length_of: str, build: Callable[[Sketch], gs.Graph], window: int) -> None:
    graph, plain = build(Sketch(length_of)), build(Sketch(length_of))
    assert counts_of([causal_masks(graph)]) == {"causal masks fused": 1}
    (node,) = [node for node in graph.nodes if node.op == "CausalMask"]
    assert node.attrs == {"local_window_size": window}
    assert not {"And", "LessOrEqual", "Greater", "Range"} & Counter(node.op for node in graph.nodes).keys()
    rng = np.random.default_rng(1)
    for batch, steps, past in ((1, 1, 0), (3, 1, 130), (2, 7, 0), (2, 5, 11), (4, 150, 30)):
        read = rng.integers(0, 2, (batch, past + steps))
        read[0] = 0
        np.testing.assert_array_equal(run(graph, read, steps), run(plain, read, steps))


def bidirectional(sketch: Sketch) -> gs.Graph:
    far = sketch.op("GreaterOrEqual", sketch.column, sketch.op("Mul", sketch.row, np.int64(-1)))
    return sketch.of(far, sketch.read)


def strictly_before(sketch: Sketch) -> gs.Graph:
    return sketch.of(sketch.op("Less", sketch.column, sketch.row), sketch.read)


def in_chunks(sketch: Sketch) -> gs.Graph:
    chunks = [sketch.op("Div", number, np.int64(8)) for number in (sketch.column, sketch.row)]
    return sketch.of(sketch.op("Equal", *chunks), sketch.causal, sketch.read)


def with_the_first_token(sketch: Sketch) -> gs.Graph:
    """An attention sink: the first column is in every window."""
    near = sketch.op("Greater", sketch.column, sketch.op("Sub", sketch.row, np.int64(8)))
    first = sketch.op("Equal", sketch.column, np.int64(0))
    return sketch.of(sketch.op("Or", near, first), sketch.causal, sketch.read)


def of_half_the_past(sketch: Sketch) -> gs.Graph:
    """A window that is as long as half of all tokens."""
    start = sketch.op("Sub", sketch.row, sketch.op("Div", sketch.total, np.int64(2)))
    return sketch.of(sketch.op("Greater", sketch.column, start), sketch.causal, sketch.read)


def padded_rows_read_all(sketch: Sketch) -> gs.Graph:
    """A sequence that is padding alone reads everything, so that no softmax is empty."""
    total = sketch.op("ReduceMax", sketch.attention_mask, [1], keepdims=1)
    empty = sketch.op("Unsqueeze", sketch.op("Equal", total, np.int64(0)), [1, 2])
    read = sketch.op("Or", sketch.read, empty)
    return sketch.of(sketch.causal, read)


@pytest.mark.parametrize(
    "build", [bidirectional, strictly_before, in_chunks, with_the_first_token, of_half_the_past, padded_rows_read_all]
)
def test_another_mask_stays(build: Callable[[Sketch], gs.Graph]) -> None:
    graph, plain = build(Sketch()), build(Sketch())
    assert counts_of([causal_masks(graph)]) == ANOTHER
    assert [node.op for node in graph.nodes] == [node.op for node in plain.nodes]


def test_a_mask_of_some_batches_alone_stays() -> None:
    """Of two sequences, because a shape is fixed."""
    sketch = Sketch()
    read = sketch.op("Reshape", sketch.read, [2, 1, 1, -1])
    graph = sketch.of(sketch.causal, read)
    why = "causal masks not fused: it cannot be computed for every batch"
    assert counts_of([causal_masks(graph)]) == {"causal masks fused": 0, why: 1}


def test_a_mask_that_reads_more_than_sizes_is_not_looked_at() -> None:
    """The same booleans for ordinary positions, but not for others."""
    sketch = Sketch()
    row = sketch.op("Unsqueeze", sketch.position_ids, [1, 3])
    graph = sketch.of(sketch.op("LessOrEqual", sketch.column, row), sketch.read)
    assert counts_of([causal_masks(graph)]) == {"causal masks fused": 0}


def test_two_masks_of_one_model() -> None:
    """As of gpt-oss: layers with and without a window."""
    sketch = Sketch()
    in_a_window(8)(sketch)
    causal(sketch)
    assert counts_of([causal_masks(sketch.graph)]) == {"causal masks fused": 2}
    assert sorted(node.attrs["local_window_size"] for node in sketch.graph.nodes if node.op == "CausalMask") == [-1, 8]
