"""Nodes of rq.moe to run in ONNX Runtime, random weights for them, and their expected results in float64."""

import functools
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import node_runner
import numpy as np
from onnx import TensorProto, helper

import rq_compile
from rq_compile.engine import library
from rq_compile.quantization.formats import PACKED_FORMATS, BlockFormat, block_size, tensors_of
from rq_compile.quantization.packing import Quantized, packed_codes
from rq_compile.rewrite.panels import float_panels, packed_panels, scale_panels

GATED = {"swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "limited_swiglu"}
ONNX_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}
# The tensors of every format group, in the order of a node's inputs.
OF_GROUPS = tuple(name for group in library.FORMAT_GROUPS for name in tensors_of(group))
# Always constants, since a session does not accept bfloat16 inputs from numpy.
CONSTANTS = {"replicas", *OF_GROUPS, "bias"}


def python_with(isa: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A separate Python process, with the kernels of `isa` (None: the processor's best) and the tested package."""
    # The working directory comes first in its path, and a source tree there would have no op library.
    places = [str(Path(__file__).parent), str(Path(rq_compile.__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)} | ({"RQ_MOE_ISA": isa} if isa else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=places[0], env=environment, capture_output=True, text=True, check=False)


OLD_RUNTIME = """
import ctypes, sys
create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda code, text: print(text.decode()) or 1)
table = (ctypes.c_void_p * 102)(ctypes.cast(create, ctypes.c_void_p).value)
get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(table) if version == 1 else None)
version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
text = ctypes.create_string_buffer(b"1.2.3")
base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value, ctypes.cast(version, ctypes.c_void_p).value)
register = ctypes.CDLL(sys.argv[1]).RegisterCustomOps
register.restype = ctypes.c_void_p
assert register(None, ctypes.byref(base)) == 1
"""


def registered_with_an_old_runtime(library: Path) -> str:
    """The message of RegisterCustomOps to a runtime that knows only version 1, from a child process, which may crash."""
    command = [sys.executable, "-P", "-c", OLD_RUNTIME, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def other_runner() -> node_runner.Runner | None:
    """What the command in RQ_NODE_RUNNER starts, for as long as this process runs."""
    command = os.environ.get("RQ_NODE_RUNNER")
    return node_runner.Runner(shlex.split(command)) if command else None


def run_op(
    op: str,
    inputs: Mapping[str, np.ndarray | None],
    results: Mapping[str, int],
    threads: int = 1,
    version: int = library.OP_SET_VERSION,
    **attributes: Any,
) -> list[np.ndarray]:
    """Run one node; `inputs` maps its input names, in order, to arrays or to None where there is none.

    Of version 1 of the op set a node keeps the places of inputs that it leaves out.
    """
    feeds = {name: array for name, array in inputs.items() if array is not None and name not in CONSTANTS}
    named = [name if array is not None else "" for name, array in inputs.items()]
    node = helper.make_node(op, named if version == 1 else list(filter(None, named)), list(results), domain="rq.moe")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info(name, ONNX_TYPES[array.dtype], [None] * array.ndim) for name, array in feeds.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in results.items()],
        [
            helper.make_tensor(name, ONNX_TYPES[array.dtype], array.shape, array.tobytes(), raw=True)
            for name, array in inputs.items()
            if array is not None and name in CONSTANTS
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("rq.moe", version)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if other := other_runner():
        return other.run(model.SerializeToString(), feeds, threads)
    return node_runner.run(model.SerializeToString(), feeds, threads, str(library.library_path()))


def dispatch(ids: np.ndarray, replicas: Any, slots: int, **options: Any) -> list[np.ndarray]:
    kinds = {"rows": TensorProto.INT32, "offsets": TensorProto.INT32}
    return run_op("Dispatch", {"ids": ids, "replicas": np.asarray(replicas, np.int32)}, kinds, slots=slots, **options)


def combine(y: np.ndarray, rows: Any, gates: np.ndarray, **options: Any) -> np.ndarray:
    return run_op("Combine", {"y": y, "rows": rows, "gates": gates}, {"out": TensorProto.FLOAT}, **options)[0]


@dataclass
class Weights:
    """Packed inputs of ExpertGemm and the float64 weights [S, N, K] that they represent; gated: N is twice the outputs."""

    inputs: dict[str, Any]
    formats: list[int]
    exact: np.ndarray
    gated: bool = False

    @property
    def outputs(self) -> int:
        return self.exact.shape[1] // (1 + self.gated)


def pack(
    rng: np.random.Generator,
    formats: list[int],
    rows: int,
    columns: int,
    float_type: Any = np.float32,
    *,
    gated: bool = False,
    block: int | None = None,
) -> Weights:
    """Random weights in the layout of the op set; each slot's values are those of its packed form."""
    block = block or block_size(columns)
    blocks, halves = -(-columns // block), 1 + gated
    stacked: dict[str, list[np.ndarray]] = {name: [] for name in OF_GROUPS}
    exact = []
    for format in formats:
        group = library.FORMAT_GROUPS[format]
        if group not in PACKED_FORMATS:
            weights = rng.normal(size=(rows, columns)).astype(float_type)
            stacked["float_weights"].append(float_panels(weights, halves))
            exact.append(weights.astype(np.float64))
            continue
        kept = PACKED_FORMATS[group]
        numbers = np.array(kept.numbers)
        zero, least = (kept.zero_point, kept.least) if isinstance(kept, BlockFormat) else (0, 0)
        code = rng.integers(zero + least, len(numbers), (rows, blocks * block)).astype(np.uint8)
        code[np.isnan(numbers[code])] = zero
        code[:, columns:] = zero
        scale: np.ndarray
        if kept.exponents:
            scale = rng.integers(118, 123, (rows, blocks)).astype(np.uint8)
            values = 0.5 * 2.0 ** (scale.astype(np.float64) - 127)
        else:
            scale = rng.uniform(0.001, 0.01, (rows, blocks)).astype(np.float32)
            values = scale.astype(np.float64)
        exact.append((numbers[code] * np.repeat(values, block, axis=1))[:, :columns])
        by_row = Quantized(packed_codes(code, kept.bits), scale)
        stacked[f"{group}_packed"].append(packed_panels(by_row, group, halves))
        stacked[f"{group}_scales"].append(scale_panels(by_row, halves))
    inputs = {name: np.stack(arrays) if arrays else None for name, arrays in stacked.items()}
    return Weights(inputs, list(formats), np.stack(exact), gated)


def expert_gemm(
    x: np.ndarray, rows: Any, offsets: np.ndarray, packed: Weights, bias: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    inputs: dict[str, Any] = {"x": x, "rows": rows, "offsets": offsets, **packed.inputs, "bias": bias}
    attributes: dict[str, Any] = {"formats": packed.formats, "outputs": packed.outputs} | options
    return run_op("ExpertGemm", inputs, {"y": TensorProto.FLOAT}, **attributes)[0]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / np.sqrt(2)))


def activated(name: str, z: np.ndarray, alpha: float = 1.702, limit: float = 7.0) -> np.ndarray:
    half = z.shape[-1] // 2
    gate, up = (z[..., :half], z[..., half:]) if name in GATED else (z, z)
    clipped = np.minimum(gate, limit)
    return {
        "none": lambda: gate,
        "swiglu": lambda: gate / (1 + np.exp(-gate)) * up,
        "geglu": lambda: gelu(gate) * up,
        "geglu_tanh": lambda: 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up,
        "clamped_swiglu": lambda: (np.clip(up, -limit, limit) + 1) * clipped / (1 + np.exp(-alpha * clipped)),
        "limited_swiglu": lambda: np.clip(up, -limit, limit) * clipped / (1 + np.exp(-clipped)),
        "relu": lambda: np.maximum(gate, 0),
        "relu2": lambda: np.maximum(gate, 0) ** 2,
        "gelu": lambda: gelu(gate),
    }[name]()


def reference(
    x: np.ndarray,
    rows: Any,
    offsets: Any,
    weights: Weights,
    bias: np.ndarray | None = None,
    activation: str = "none",
    gather: int = 0,
    **attributes: Any,
) -> np.ndarray:
    top_k = len(rows) // max(len(x), 1)
    result = []
    for slot in range(len(offsets) - 1):
        for i in range(offsets[slot], offsets[slot + 1]):
            z = weights.exact[slot] @ x[rows[i] // top_k if gather else i].astype(np.float64)
            result.append(activated(activation, z + bias[slot] if bias is not None else z, **attributes))
    return np.array(result)


def assert_close(ours: np.ndarray, exact: np.ndarray) -> None:
    assert ours.shape == exact.shape
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def routed(rng: np.random.Generator, tokens: int, top_k: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows and offsets over the slots, as Dispatch would compute them."""
    slot = rng.integers(0, slots, tokens * top_k)
    rows = np.argsort(slot, kind="stable").astype(np.int32)
    return rows, np.concatenate([[0], np.cumsum(np.bincount(slot, minlength=slots))]).astype(np.int32)
