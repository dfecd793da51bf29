"""Attention to a cache: CacheAttention beside ONNX Runtime's MultiHeadAttention, GroupQueryAttention and separate ops.

Every op gets the form that suits it: CacheAttention and GroupQueryAttention update caches with room in place (one buffer for past
and present), MultiHeadAttention has no mask in a decoding step and is causal by its attribute otherwise. The separate ops are
Concat, MatMul, Softmax and MatMul; they stand for heads whose keys and values differ in size, which the stock ops do not take.
``copying`` is CacheAttention without room. Times are medians; the ops take turns.

    python benchmarks/cache_attention.py -o benchmarks/results/cache_attention.json
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from machine import Probe
from onnx import ModelProto, TensorProto, helper
from provenance import write_rows

from rq_compile.engine import library


@dataclass(frozen=True)
class Shape:
    """Query heads, key heads, and the sizes of a head's keys and values."""

    name: str
    heads: int
    kv_heads: int
    width: int
    value_width: int


@dataclass(frozen=True)
class Step:
    """New tokens of each of ``batch`` sequences after ``past`` tokens."""

    batch: int
    past: int
    tokens: int

    def __str__(self) -> str:
        kind = "decode" if self.tokens == 1 else f"prefill {self.tokens}"
        return f"{kind}, batch {self.batch}, past {self.past}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe-sample", 4, 4, 32, 32),
        Shape("OLMoE", 16, 16, 128, 128),
        Shape("Qwen3-30B-A3B", 32, 4, 128, 128),
        Shape("DeepSeek-V2-Lite", 16, 16, 192, 128),
    )
}
DECODE = [*(Step(batch, past, 1) for batch in (1, 8, 32) for past in (200, 1000)), Step(1, 8000, 1)]
PREFILL = [Step(1, 0, 128), Step(1, 1000, 128), Step(1, 0, 1024)]
ROUNDS = 4


def numbers(*shape: int) -> np.ndarray:
    """Random numbers, repeated: to make them takes no longer than to write them."""
    some = np.random.default_rng(0).standard_normal(min(int(np.prod(shape)), 65521), np.float32)
    return np.resize(some, shape)


class Contender:
    """One op (or some) and its inputs; ``run`` computes a step."""

    def __init__(self, model: ModelProto, feeds: dict[str, np.ndarray], threads: int, in_place: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library.library_path()))
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._feeds = feeds
        self._binding = self._session.io_binding()
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for output in self._session.get_outputs():
            past = output.name.replace("present", "past")
            if in_place and past in self._values:
                self._binding.bind_ortvalue_output(output.name, self._values[past])
            else:
                self._binding.bind_output(output.name)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def result(self) -> np.ndarray:
        self.run()
        return np.array(self._binding.get_outputs()[0].numpy())


def model_of(nodes: list[Any], feeds: dict[str, np.ndarray], constants: dict[str, np.ndarray]) -> ModelProto:
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(bool): TensorProto.BOOL, np.dtype(np.int32): TensorProto.INT32}
    kinds[np.dtype(np.int64)] = TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, kinds[array.dtype], array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "present_key", "present_value")],
        [helper.make_tensor(name, kinds[a.dtype], a.shape, a.tobytes(), raw=True) for name, a in constants.items()],
    )
    domains = {"": 17, "com.microsoft": 1, "rq.moe": library.OP_SET_VERSION}
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=10)


class Inputs:
    """What the ops of one step read."""

    def __init__(self, shape: Shape, step: Step) -> None:
        self.shape, self.step = shape, step
        self._caches: dict[int, dict[str, np.ndarray]] = {}
        self.total = step.past + step.tokens
        self.fresh = {
            "query": numbers(step.batch, step.tokens, shape.heads * shape.width),
            "key": numbers(step.batch, step.tokens, shape.kv_heads * shape.width),
            "value": numbers(step.batch, step.tokens, shape.kv_heads * shape.value_width),
        }

    def caches(self, columns: int) -> dict[str, np.ndarray]:
        """With room for ``columns``."""
        if columns not in self._caches:
            self._caches[columns] = self._filled(columns)
        return self._caches[columns]

    def _filled(self, columns: int) -> dict[str, np.ndarray]:
        batch, heads = self.step.batch, self.shape.kv_heads
        kept = {
            "past_key": numbers(batch, heads, self.step.past, self.shape.width),
            "past_value": numbers(batch, heads, self.step.past, self.shape.value_width),
        }
        if columns == self.step.past:
            return kept
        room = {name: np.zeros((*past.shape[:2], columns, past.shape[3]), np.float32) for name, past in kept.items()}
        for name, past in kept.items():
            room[name][:, :, : self.step.past] = past
        return room

    def names(self, *more: str) -> list[str]:
        return ["query", "key", "value", *more]


OUTPUTS = ["y", "present_key", "present_value"]


def cache_attention(inputs: Inputs, threads: int, in_place: bool) -> Contender:
    shape = inputs.shape
    rows = np.arange(inputs.step.past, inputs.total)[:, None]
    mask = (np.arange(inputs.total) <= rows)[None, None]
    feeds = inputs.fresh | inputs.caches(inputs.total if in_place else inputs.step.past) | {"mask": mask}
    node = helper.make_node(
        "CacheAttention",
        inputs.names("past_key", "past_value", "mask"),
        OUTPUTS,
        domain="rq.moe",
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        scale=shape.width**-0.5,
    )
    return Contender(model_of([node], feeds, {}), feeds, threads, in_place)


def multi_head(inputs: Inputs, threads: int) -> Contender:
    feeds = inputs.fresh | inputs.caches(inputs.step.past)
    node = helper.make_node(
        "MultiHeadAttention",
        [*inputs.names(), "", "", "", "past_key", "past_value"],
        OUTPUTS,
        domain="com.microsoft",
        num_heads=inputs.shape.heads,
        unidirectional=int(inputs.step.tokens > 1),
    )
    return Contender(model_of([node], feeds, {}), feeds, threads, in_place=False)


def group_query(inputs: Inputs, threads: int) -> Contender:
    lengths = {"seqlens_k": np.full(inputs.step.batch, inputs.total - 1, np.int32), "total": np.array(inputs.total, np.int32)}
    feeds = inputs.fresh | inputs.caches(inputs.total) | lengths
    node = helper.make_node(
        "GroupQueryAttention",
        inputs.names("past_key", "past_value", "seqlens_k", "total"),
        OUTPUTS,
        domain="com.microsoft",
        num_heads=inputs.shape.heads,
        kv_num_heads=inputs.shape.kv_heads,
    )
    return Contender(model_of([node], feeds, {}), feeds, threads, in_place=True)


def separate_ops(inputs: Inputs, threads: int) -> Contender:
    """Of a model with as many key heads as query heads."""
    shape, step = inputs.shape, inputs.step
    feeds = inputs.fresh | inputs.caches(step.past)
    allowed = np.arange(inputs.total) <= np.arange(step.past, inputs.total)[:, None]
    constants: dict[str, np.ndarray] = {
        "split": np.array([step.batch, step.tokens, shape.heads, -1], np.int64),
        "joined": np.array([step.batch, step.tokens, -1], np.int64),
        "scale": np.array(shape.width**-0.5, np.float32),
        "bias": np.where(allowed, 0, -1e9).astype(np.float32)[None, None],
    }
    nodes = []

    def add(op: str, operands: Iterable[str], result: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, list(operands), [result], **attributes))

    for name in ("query", "key", "value"):
        add("Reshape", [name, "split"], f"{name}_split")
        add("Transpose", [f"{name}_split"], f"{name}_heads", perm=[0, 2, 1, 3])
    for name in ("key", "value"):
        add("Concat", [f"past_{name}", f"{name}_heads"], f"present_{name}", axis=2)
    add("Transpose", ["present_key"], "columns", perm=[0, 1, 3, 2])
    add("MatMul", ["query_heads", "columns"], "products")
    add("Mul", ["products", "scale"], "scaled")
    add("Add", ["scaled", "bias"], "scores")
    add("Softmax", ["scores"], "weights", axis=-1)
    add("MatMul", ["weights", "present_value"], "sums")
    add("Transpose", ["sums"], "sums_split", perm=[0, 2, 1, 3])
    add("Reshape", ["sums_split", "joined"], "y")
    return Contender(model_of(nodes, feeds, constants), feeds, threads, in_place=False)


Maker = Callable[[Inputs, int], Contender]


def contenders(shape: Shape) -> dict[str, Maker]:
    found: dict[str, Maker] = {
        "in place": partial(cache_attention, in_place=True),
        "copying": partial(cache_attention, in_place=False),
    }
    if shape.width != shape.value_width:
        return found | {"separate ops": separate_ops}
    if shape.heads == shape.kv_heads:
        found["MultiHeadAttention"] = multi_head
    return found | {"GroupQueryAttention": group_query}


def microseconds(
    makers: Mapping[str, Callable[[Any, int], Contender]], inputs: Any, threads: int, seconds: float
) -> dict[str, float]:
    """Median times. ``inputs``: what the makers take, with a ``shape`` and a ``step``. A round makes a session of one op after
    the other: threads of another one would take a core as they wait."""
    took: dict[str, list[float]] = {name: [] for name in makers}
    expected = None
    for _, (name, make) in itertools.product(range(ROUNDS), makers.items()):
        one = make(inputs, threads)
        result = one.result()
        expected = result if expected is None else expected
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4, err_msg=f"{inputs.shape.name}, {inputs.step}: {name}")
        start = time.perf_counter()
        one.run()
        repeats = max(1, int(2e-4 / (time.perf_counter() - start)))
        end = time.perf_counter() + seconds / ROUNDS
        while True:
            start = time.perf_counter()
            for _ in range(repeats):
                one.run()
            stop = time.perf_counter()
            took[name].append((stop - start) / repeats)
            if stop > end:
                break
        del one
    return {name: 1e6 * median(times) for name, times in took.items()}


def measured(shape: Shape, step: Step, threads: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    inputs = Inputs(shape, step)
    times = {name: round(value, 1) for name, value in microseconds(contenders(shape), inputs, threads, seconds).items()}
    read = 4 * step.batch * shape.kv_heads * inputs.total * (shape.width + shape.value_width)
    row: dict[str, Any] = {"shape": shape.name, "step": str(step), "threads": threads, "microseconds": times, "cache_bytes": read}
    if step.tokens == 1:
        row |= {
            "gigabytes_per_second": round(read / times["in place"] / 1e3, 1),
            "of_bandwidth": round(read / times["in place"] * 1e6 / bandwidth, 2),
        }
    others = [value for name, value in times.items() if name not in ("in place", "copying")]
    return row | {"times_faster": round(min(others) / times["in place"], 2)}


def line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {value:.0f}" for name, value in row["microseconds"].items())
    reads = f"; {row['gigabytes_per_second']} GB/s, {row['of_bandwidth']:.0%} of the bandwidth" if "of_bandwidth" in row else ""
    return f"{row['shape']}, {row['step']}, {row['threads']} threads: {times} us; {row['times_faster']} times faster{reads}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", choices=("decode", "prefill", "all"), default="all")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each op in a cell")
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON")
    arguments = parser.parse_args()
    steps = (DECODE if arguments.steps != "prefill" else []) + (PREFILL if arguments.steps != "decode" else [])
    probe, rows = Probe(), []
    for threads in arguments.threads:
        bandwidth = max(probe.machine(threads).bandwidth for _ in range(10))
        print(f"{threads} threads read {bandwidth / 1e9:.1f} GB/s")
        for name in arguments.shapes:
            for step in steps:
                row = measured(SHAPES[name], step, threads, arguments.seconds, bandwidth)
                rows.append(row | {"bandwidth": round(bandwidth)})
                print(line(row), flush=True)
    if arguments.output:
        write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
