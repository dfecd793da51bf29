"""Graphs as they are exported, before passes fuse their ops, and how to run them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from rq_compile.engine.library import library_path
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.rewrite import exported

END = np.iinfo(np.int64).max


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
