"""librq_moe_cuda.so in ONNX Runtime, without CUDA and without a GPU."""

import re
import secrets
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import op_nodes
import pytest
from layer_arrays import arrays_of
from node_model import feeds_of, model_of, session_of
from plugin_builds import SANITIZED, checked, cuda_library

MIXED = [0, 1, 2]


@pytest.fixture
def on_host(cuda_ops: Path, cuda_parts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The library to register in ONNX Runtime, which adds the ops to the CPU provider."""
    monkeypatch.setenv("RQ_LIBRARY", str(cuda_ops))
    return cuda_parts["RQ_HOST"]


def test_it_exports_one_function_and_needs_neither_onnxruntime_nor_a_driver(cuda_ops: Path) -> None:
    exported = checked("nm", "-D", "--defined-only", cuda_ops)
    assert [line.split()[-1] for line in exported.splitlines()] == ["RegisterCustomOps"]
    needed = re.findall(r"NEEDED.*\[(.+)\]", checked("readelf", "-d", cuda_ops))
    assert not [name for name in needed if re.search("cuda|cudart|onnx", name)]


def test_old_runtime_is_refused_politely(cuda_ops: Path) -> None:
    expected = "librq_moe_cuda.so needs ONNX Runtime 1.18 or newer, this is 1.2.3; upgrade onnxruntime"
    assert op_nodes.registered_with_an_old_runtime(cuda_ops) == expected


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("formats", [[0, 0], [1, 1], [2, 2], [5, 5], [0, 6], MIXED, [6, 1, 5]])
@pytest.mark.parametrize("bias", [False, True])
def test_onnxruntime_takes_the_node_and_misses_only_cuda(cuda_ops: Path, half: Any, formats: list[int], bias: bool) -> None:
    """The graph is checked against the registered schema before kernels are searched for."""
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*implementation for MoeLayer\(1\)"):
        session_of(model_of(arrays_of(formats, bias=bias, half=half), formats=formats), cuda_ops)


@pytest.mark.parametrize(
    ("place", "dtype", "name"), [(0, np.float32, "x"), (1, np.int32, "ids"), (2, np.float16, "gates"), (3, np.int64, "replicas")]
)
def test_onnxruntime_refuses_wrong_types_by_the_schema(cuda_ops: Path, place: int, dtype: Any, name: str) -> None:
    arrays = arrays_of(MIXED)
    arrays[place] = arrays[place].astype(dtype)
    with pytest.raises(Exception, match=rf"Type Error: Type .* of input parameter \(input{place}\) of operator \(MoeLayer\)"):
        session_of(model_of(arrays, formats=MIXED), cuda_ops)


def test_onnxruntime_refuses_too_few_inputs_by_the_schema(cuda_ops: Path) -> None:
    with pytest.raises(Exception, match=r"has input size 8 not in range \[min=9"):
        session_of(model_of(arrays_of([0, 0])[:8], formats=[0, 0]), cuda_ops)


REFUSED: dict[str, Any] = {
    "field formats is missing": {},
    "field formats has 7; 0 is float, 1 is int8, .*, 5 is int3, 6 is int2": {"formats": [0, 7]},
    "field formats is not a list of integers": {"formats": [0.5, 1.5]},
    "field activation has an activation that is unknown": {"formats": MIXED, "activation": "swish"},
    "field activation is not a string": {"formats": MIXED, "activation": 1},
    "field alpha is not a float": {"formats": MIXED, "alpha": 2},
    "field limit has a value that is not finite": {"formats": MIXED, "limit": float("inf")},
    "field shares is not a list of floats": {"formats": MIXED, "shares": [1, 0, 0]},
    "field shares has 2 values for 3 slots": {"formats": MIXED, "shares": [0.5, 0.5]},
    "field shares has 2.0+; a share is a part of all pairs": {"formats": MIXED, "shares": [2.0, 0.5, 0.5]},
    "these formats need 17 inputs, or 19 with biases, and 18 are given": {"formats": MIXED, "extra": 1},
    "up_int8_packed has a wrong type": {"formats": MIXED, "change": (7, np.int32)},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_the_schema_cannot_know_is_refused_at_load(on_host: str, sentence: str) -> None:
    attributes: dict[str, Any] = dict(REFUSED[sentence])
    arrays = arrays_of(MIXED)
    arrays += [arrays[5]] * attributes.pop("extra", 0)
    if "change" in attributes:
        place, dtype = attributes.pop("change")
        arrays[place] = arrays[place].astype(dtype)
    with pytest.raises(Exception, match=f"rq.moe MoeLayer: {sentence}"):
        session_of(model_of(arrays, **attributes), on_host)


def test_shapes_that_the_graph_knows_are_checked_at_load(on_host: str) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hidden": 72}, "multiples of 16, not 72"),
        ({"block": 32}, "multiples of 64, not 32"),
    ]
    for wrong, sentence in cases:
        with pytest.raises(Exception, match=f"rq.moe MoeLayer: .*{sentence}"):
            session_of(model_of(arrays_of(MIXED, gated=True, **wrong), formats=MIXED, activation="swiglu"), on_host)


def test_bf16_is_taken_by_an_op_of_its_own(on_host: str) -> None:
    """Recognized by the missing kernel: only those for fp16 were built."""
    with pytest.raises(Exception, match="this library was built without the kernel combine_bf16"):
        session_of(model_of(arrays_of(MIXED, half=ml_dtypes.bfloat16), formats=MIXED), on_host)


def test_without_a_driver_a_run_is_refused_and_not_the_session(on_host: str) -> None:
    if any(Path(folder, "libcuda.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")):
        pytest.skip("this machine has a CUDA driver")
    arrays = arrays_of(MIXED, gated=True)
    session = session_of(model_of(arrays, formats=MIXED, activation="swiglu"), on_host)
    with pytest.raises(Exception, match=r"rq.moe MoeLayer: no CUDA driver: libcuda.so.1"):
        session.run(None, feeds_of(session, arrays))


def test_what_it_computes_is_the_layer(
    cuda_ops: Path, cuda_parts: dict[str, str], built_kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a separate Python process, since Triton decides at import whether it interprets."""
    for name, value in {**cuda_parts, "RQ_LIBRARY": cuda_ops, "RQ_KERNELS": built_kernels, "TRITON_INTERPRET": 1}.items():
        monkeypatch.setenv(name, str(value))
    arguments = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "interpreted_cuda_ops.py"]
    result = op_nodes.python_with(None, *arguments)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_random_nodes_break_nothing(
    tmp_path: Path, cuda_headers: Path, cuda_parts: dict[str, str], built_kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library with sanitizers, in a Python process that has loaded the sanitizers' libraries."""
    checking = cuda_library(tmp_path, cuda_headers, built_kernels, *SANITIZED)
    sanitizers = [checked("gcc", f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    options: dict[str, Any] = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "LD_PRELOAD": " ".join(sanitizers),
    }
    for name, value in {**cuda_parts, **options, "RQ_LIBRARY": str(checking)}.items():
        monkeypatch.setenv(name, value)
    seed = secrets.randbits(31)
    result = op_nodes.python_with(None, "cuda_ops_fuzz.py", str(seed), "600")
    assert result.returncode == 0, f"seed {seed}\n{result.stdout[-2000:]}{result.stderr[-3000:]}"
    taken, ran = map(int, result.stdout.split())
    assert taken > ran > 0, f"seed {seed}"
