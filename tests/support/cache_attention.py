"""Nodes of CacheAttention to run in ONNX Runtime, random inputs for them, and their expected results in float64.

Run as a program, it checks some cases with the instruction set of RQ_MOE_ISA.
"""

import ctypes
import itertools
import mmap
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import onnxruntime
from onnx import GraphProto, TensorProto, helper

from rq_compile.engine import library

INPUTS = ("query", "key", "value", "past_key", "past_value", "mask", "sinks", "cos", "sin")
OPTIONAL = INPUTS[6:]


@dataclass(frozen=True)
class Case:
    """Inputs of one call. past_key and past_value may have room for more columns than the mask."""

    heads: int
    kv_heads: int
    scale: float
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    past_key: np.ndarray
    past_value: np.ndarray
    mask: np.ndarray
    sinks: np.ndarray | None = None
    cos: np.ndarray | None = None
    sin: np.ndarray | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The optional inputs that there are."""
        return tuple(name for name in OPTIONAL if getattr(self, name) is not None)

    @property
    def total(self) -> int:
        return self.mask.shape[3]

    @property
    def kept(self) -> int:
        """Columns of the past that stay."""
        return self.total - self.query.shape[1]

    @property
    def length(self) -> int:
        return max(self.past_key.shape[2], self.total)

    def feeds(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in INPUTS if getattr(self, name) is not None}


def causal(steps: int, total: int, padding: int = 0, window: int | None = None) -> np.ndarray:
    """The mask [1, 1, steps, total] of the last `steps` columns; the first `padding` columns are not read."""
    columns, rows = np.arange(total), np.arange(total - steps, total)[:, None]
    mask = (columns <= rows) & (columns >= padding)
    return (mask if window is None else mask & (columns > rows - window))[None, None]


def random_case(
    rng: np.random.Generator,
    mask: np.ndarray,
    heads: int = 4,
    kv_heads: int = 4,
    width: int = 32,
    value_width: int | None = None,
    *,
    sequences: int | None = None,
    steps: int | None = None,
    length: int = 0,
    sinks: bool = False,
    rotated: bool = False,
) -> Case:
    """Whatever no row reads, also beyond the mask, is NaN. A `length` of 0 is a cache without room. `rotated`: whether the op
    rotates queries and keys."""
    batch, steps, total = sequences or mask.shape[0], mask.shape[2] if steps is None else steps, mask.shape[3]
    value_width = value_width or width

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    past_key, past_value = (normal(batch, kv_heads, length or total - steps, size) for size in (width, value_width))
    key, value = normal(batch, steps, kv_heads * width), normal(batch, steps, kv_heads * value_width)
    unread = np.broadcast_to(~mask.any(axis=(1, 2)), (batch, total))
    for b in range(batch):
        for past, fresh in ((past_key, key), (past_value, value)):
            past[b, :, : total - steps][:, unread[b, : total - steps]] = np.nan
            past[b, :, total - steps :] = np.nan
            fresh[b, unread[b, total - steps :]] = np.nan
    query = 2 * normal(batch, steps, heads * width)
    angles = rng.uniform(-9, 9, size=(batch * steps, width // 2))
    cos, sin = (function(angles).astype(np.float32) if rotated else None for function in (np.cos, np.sin))
    of_heads = normal(heads) if sinks else None
    return Case(heads, kv_heads, width**-0.5, query, key, value, past_key, past_value, mask, of_heads, cos, sin)


def rotated_in_float64(case: Case) -> Case:
    """The case whose queries and keys are those that the op rotates."""
    if case.cos is None or case.sin is None:
        return case
    batch, steps, _ = case.query.shape
    cos, sin = (angles.astype(np.float64).reshape(batch, steps, 1, -1) for angles in (case.cos, case.sin))

    def turned(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x.astype(np.float64).reshape(batch, steps, -1, 2 * cos.shape[-1]), 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)

    return replace(case, query=turned(case.query), key=turned(case.key), cos=None, sin=None)


@lru_cache(maxsize=64)
def session(
    heads: int, kv_heads: int, scale: float, given: tuple[str, ...] = (), threads: int = 1
) -> onnxruntime.InferenceSession:
    names = [*INPUTS[:6], *given]
    operands = [name if name in names else "" for name in INPUTS] if "cos" in given else names
    node = helper.make_node(
        "CacheAttention", operands, ["y", "present_key", "present_value"], domain="rq.moe",
        num_heads=heads, kv_num_heads=kv_heads, scale=scale,
    )  # fmt: skip
    ranks = dict.fromkeys(INPUTS[:3], 3) | dict.fromkeys(INPUTS[3:6], 4) | {"sinks": 1, "cos": 2, "sin": 2}
    kinds = dict.fromkeys(INPUTS, TensorProto.FLOAT) | {"mask": TensorProto.BOOL}
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info(name, kinds[name], [None] * ranks[name]) for name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
    )
    return opened(graph, threads)


def opened(graph: GraphProto, threads: int) -> onnxruntime.InferenceSession:
    """A session of a graph of ops of the library; it logs nothing."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("rq.moe", library.OP_SET_VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library.library_path()))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def session_of(case: Case, threads: int = 1) -> onnxruntime.InferenceSession:
    return session(case.heads, case.kv_heads, case.scale, case.given, threads)


def attend(case: Case, threads: int = 1) -> list[np.ndarray]:
    return session_of(case, threads).run(None, case.feeds())


def attend_in_place(case: Case, threads: int = 1) -> list[np.ndarray]:
    return run_in_place(session_of(case, threads), case.feeds())


def run_in_place(running: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a call whose presents are the buffers of its pasts, of which a copy is used."""
    binding = running.io_binding()
    buffers = {}
    for name, array in feeds.items():
        if name.startswith("past_"):
            buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array))
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(name.replace("past_", "present_"), buffer)
    running.run_with_iobinding(binding)
    # numpy() may be a view of memory that the binding owns.
    return [np.array(value.numpy()) for value in (binding.get_outputs()[0], *buffers.values())]


class Guarded:
    """A copy of an array that ends where the process may not read on; an op that does ends with a signal."""

    def __init__(self, array: np.ndarray) -> None:
        size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.shape, self.address = array.shape, begin + size - array.nbytes
        ctypes.memmove(self.address, array.ctypes.data, array.nbytes)
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(begin + size), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")


def attend_at_the_end_of_memory(case: Case) -> np.ndarray:
    """y of a call in place whose caches are ``Guarded``."""
    running = session_of(case)
    binding = running.io_binding()
    caches = {name: Guarded(getattr(case, f"past_{name}")) for name in ("key", "value")}
    for name, array in case.feeds().items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    for name, cache in caches.items():
        binding.bind_input(f"past_{name}", "cpu", 0, np.float32, cache.shape, cache.address)
        binding.bind_output(f"present_{name}", "cpu", 0, np.float32, cache.shape, cache.address)
    running.run_with_iobinding(binding)
    return np.array(binding.get_outputs()[0].numpy())


def presents(case: Case) -> list[np.ndarray]:
    """The columns of the caches that are defined."""

    def joined(past: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        batch, steps, _ = fresh.shape
        split = fresh.reshape(batch, steps, case.kv_heads, past.shape[3]).transpose(0, 2, 1, 3)
        return np.concatenate([past[:, :, : case.kept], split], axis=2)

    return [joined(case.past_key, case.key), joined(case.past_value, case.value)]


def reference(case: Case) -> np.ndarray:
    """y in float64, one query after the other; nothing that a mask excludes enters a sum."""
    keys, values = (cache.astype(np.float64) for cache in presents(case))
    batch, steps, _ = case.query.shape
    queries = case.query.reshape(batch, steps, case.heads, keys.shape[3]).astype(np.float64)
    y = np.zeros((batch, steps, case.heads, values.shape[3]))
    mask = np.broadcast_to(case.mask, (batch, 1, steps, case.total))
    for b in range(batch):
        for s in range(steps):
            read = mask[b, 0, s]
            if not read.any():
                continue
            for h in range(case.heads):
                of = h // (case.heads // case.kv_heads)
                scores = keys[b, of, read] @ queries[b, s, h] * case.scale
                sink = [] if case.sinks is None else [float(case.sinks[h])]
                largest = max([scores.max(), *sink])
                weights = np.exp(scores - largest)
                y[b, s, h] = weights @ values[b, of, read] / (weights.sum() + sum(np.exp(value - largest) for value in sink))
    return y.reshape(batch, steps, case.heads * values.shape[3])


def check(case: Case, outputs: list[np.ndarray]) -> None:
    y, *caches = outputs
    exact = rotated_in_float64(case)
    expected = reference(exact)
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * max(1.0, np.abs(expected).max(initial=0)))
    for cache, present in zip(caches, presents(exact), strict=True):
        assert cache.shape == (*present.shape[:2], case.length, present.shape[3])
        np.testing.assert_allclose(cache[:, :, : case.total], present, rtol=0, atol=1e-6 if case.cos is not None else 0)


def without(case: Case, padding: int) -> Case:
    """The same call without the first columns of the past, which nothing reads."""
    return replace(
        case, past_key=case.past_key[:, :, padding:], past_value=case.past_value[:, :, padding:], mask=case.mask[..., padding:]
    )


def main() -> None:
    rng = np.random.default_rng(5)
    for steps in (1, 2, 19):
        for heads, kv_heads, width, value_width in ((4, 4, 32, 32), (6, 2, 21, 40), (10, 1, 8, 3)):
            padded = np.concatenate([causal(steps, 90), causal(steps, 90, 3), causal(steps, 90, 0, 7)])
            padded[1, 0, :, 20:31] = False
            check(case := random_case(rng, padded, heads, kv_heads, width, value_width, sinks=True, length=100), attend(case))
    for steps, total, width in itertools.product((1, 2), range(2, 36), (8, 16, 40, 128)):
        case = random_case(rng, causal(steps, total), 2, 1, width, length=total)
        np.testing.assert_array_equal(attend_at_the_end_of_memory(case), attend(case)[0])


if __name__ == "__main__":
    main()
