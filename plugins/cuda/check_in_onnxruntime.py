"""Compare MoeLayer in ONNX Runtime's CUDA provider with float64, on the GPU of this machine. Needs no network.

    python plugins/cuda/check_in_onnxruntime.py build/cuda/librq_moe_cuda.so

Needs onnxruntime-gpu, onnx and torch (for the CPU). Each number is the largest error divided by the allowed rounding; up to 1 is
correct. The exit status is 1 if any number is larger.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
sys.path.append(str(Path(__file__).parent))

from node_model import feeds_of, model_of, session_of
from rq_kernels import reference

# Allowed error relative to the largest result.
ALLOWED = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
REPLICAS = [[0, 1, 2], [3, -1, -1], [4, -1, -1]]


@dataclass(frozen=True)
class Case:
    name: str
    formats: tuple[int, ...] = (0, 1, 2, 1, 2)
    dtype: torch.dtype = torch.float16
    tokens: int = 9
    options: dict[str, Any] = field(default_factory=dict)


BF16 = torch.bfloat16
CASES = [
    Case("mixed"),
    Case("mixed bf16", dtype=BF16),
    Case("float", (0,) * 5),
    Case("float bf16", (0,) * 5, BF16),
    Case("int8", (1,) * 5),
    Case("int4", (2,) * 5),
    Case("int4 bf16", (2,) * 5, BF16),
    Case("int3", (5,) * 5),
    Case("int2 bf16", (6,) * 5, BF16),
    Case("few bits", (5, 1, 6, 2, 0)),
    Case("few bits bf16", (6, 5, 2, 0, 6), BF16, tokens=200),
    Case("few bits in 64s", (5, 6, 2, 6, 5), options={"block": 64, "hidden": 192, "intermediate": 192}),
    Case("one token", tokens=1),
    Case("no token", tokens=0),
    Case("batch tiles", tokens=200),
    Case("prefill tiles", tokens=1500),
    Case("biases", options={"bias": True, "activation": "clamped_swiglu"}),
    Case("no gate", options={"activation": "gelu"}),
    Case("blocks of 64", options={"block": 64, "hidden": 192, "intermediate": 192}),
    Case("large", tokens=600, options={"hidden": 2048, "intermediate": 1408}),
]


def arrays_of(layer: Any, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> list[np.ndarray]:
    """The node's inputs, in order. Packed bytes are declared int8."""
    tensors = [x, ids, gates, layer.replicas, layer.formats]
    for part in (layer.up, layer.down):
        tensors += part.inputs()
    return [array_of(tensor) for tensor in tensors]


def array_of(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return (tensor.view(torch.int8) if tensor.dtype == torch.uint8 else tensor).numpy()


def attributes_of(layer: Any) -> dict[str, Any]:
    numbers = {"alpha": layer.alpha, "limit": layer.limit}
    return {"formats": layer.formats.tolist(), "activation": layer.activation, **numbers}


def error(case: Case, seed: int, library: str, provider: str) -> float:
    random = torch.Generator().manual_seed(seed)
    shape: dict[str, Any] = {"hidden": 256, "intermediate": 128, "activation": "swiglu", "replicas": REPLICAS} | case.options
    held = reference.example(random, list(case.formats), **shape, dtype=case.dtype)
    x = torch.randn(case.tokens, held.layer.hidden, generator=random).to(case.dtype)
    ids = torch.rand(case.tokens, len(REPLICAS), generator=random).argsort(1)[:, :2].contiguous()
    gates = torch.rand(case.tokens, 2, generator=random)
    arrays = arrays_of(held.layer, x, ids, gates)
    session = session_of(model_of(arrays, through_fp32=True, **attributes_of(held.layer)), library, provider)
    out = session.run(None, feeds_of(session, [x.float().numpy(), *arrays[1:]]))[0]
    if out.shape != x.shape:
        raise ValueError(f"the output is {out.shape} where {tuple(x.shape)} is needed")
    if case.tokens == 0:
        return 0.0
    expected = reference.moe_layer(x, ids, gates, held)
    return float((torch.from_numpy(out) - expected).abs().max() / expected.abs().max() / ALLOWED[case.dtype])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--provider", default="CUDAExecutionProvider", help="provider of ONNX Runtime; tests use another")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="default: a different one each time")
    args = parser.parse_args(arguments)
    if args.provider not in onnxruntime.get_available_providers():
        parser.error(f"ONNX Runtime {onnxruntime.__version__} has no {args.provider} here; install onnxruntime-gpu")
    chosen = [case for case in CASES if args.only in case.name]
    if not chosen:
        parser.error(f"no case's name contains '{args.only}'; leave --only out to see the names")
    print(f"{args.provider}, ONNX Runtime {onnxruntime.__version__}, seed {args.seed}")
    wrong = 0
    for case in chosen:
        try:
            found = error(case, args.seed, str(args.library), args.provider)
        except Exception as failure:  # one case that fails must not hide the others
            print(f"FAILED  {case.name}: {failure}", flush=True)
            wrong += 1
            continue
        wrong += not found <= 1
        print(f"{'ok    ' if found <= 1 else 'FAILED'}  {case.name:20} {found:.2f}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} cases are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
