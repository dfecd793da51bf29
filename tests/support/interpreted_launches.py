"""Launches of the launcher, computed by Triton's interpreter, and layers to launch.

A libcuda.so.1 of the tests' own (cuda_stand_in.cc) hands over each launch: the image, the grid and the parameters. RQ_STAND_IN
says where it is, RQ_KERNELS what was built.
"""

import ctypes
import hashlib
import json
import os
import secrets
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "plugins" / "kernels"))

from rq_kernels import reference
from rq_kernels.variants import variants

SEED = secrets.randbits(32)
torch.set_num_threads(1)
FOLDER = Path(os.environ["RQ_KERNELS"])
DESCRIBED = {kernel["name"]: kernel for kernel in json.loads((FOLDER / "kernels.json").read_text())["kernels"]}
KERNELS = {variant.name: variant for variant in variants()}
IMAGES = {
    build[kind]["sha256"]: kernel for kernel in DESCRIBED.values() for build in kernel["builds"] for kind in ("cubin", "ptx")
}
DTYPES = {"*fp16": torch.float16, "*i64": torch.int64, "*i32": torch.int32, "*fp32": torch.float32, "*u8": torch.uint8}

LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
# Its name is libcuda.so.1, so a library's dlopen finds it loaded.
DRIVER = ctypes.CDLL(os.environ["RQ_STAND_IN"], mode=ctypes.RTLD_GLOBAL)


def image_kernel(address: int) -> tuple[Any, str]:
    """The entry of kernels.json whose cubin or PTX is at this address, and which of the two it is."""
    if ctypes.string_at(address, 4) != b"\x7fELF":
        return IMAGES[hashlib.sha256(ctypes.string_at(address)).hexdigest()], "ptx"
    header = ctypes.string_at(address, 64)
    programs, sections = struct.unpack_from("<QQ", header, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", header, 54)
    size = max(programs + program_size * program_count, sections + section_size * section_count)
    return IMAGES[hashlib.sha256(ctypes.string_at(address, size)).hexdigest()], "cubin"


def tensor_at(address: int, kind: str) -> torch.Tensor:
    """A tensor whose data begin at ``address``; the interpreter needs nothing else."""
    if not address:
        return torch.empty(0, dtype=DTYPES[kind])
    size = torch.empty(0, dtype=DTYPES[kind]).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=DTYPES[kind])


class Launches:
    """The launches: ``(name, kind of image, grid)``. ``compute``: compute the kernels' results, too."""

    def __init__(self, sm: int = 80, compute: bool = True) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        self.failure: BaseException | None = None
        self.compute = compute
        self.function = LAUNCHED(self.launched)
        DRIVER.stand_in(sm, self.function)

    def launched(self, image: int, entry: bytes, grid: Any, threads: int, shared: int, parameters: Any) -> int:
        try:
            kernel, kind = image_kernel(image)
            build = kernel["builds"][0]
            assert (entry.decode(), threads, shared) == (build["entry"], 32 * kernel["warps"], build["shared"])
            self.seen.append((kernel["name"], kind, tuple(grid[:3])))
            hidden = parameters[len(kernel["parameters"]) : len(kernel["parameters"]) + len(kernel["hidden_parameters"])]
            assert [ctypes.c_uint64.from_address(each).value for each in hidden] == [0, 0]
            if self.compute:
                values = [read(parameters[i], p["type"]) for i, p in enumerate(kernel["parameters"])]
                KERNELS[kernel["name"]].kernel[tuple(grid[:3])](*values, **kernel["constants"])
        except BaseException as error:
            self.failure = error
            return 1
        return 0


def read(address: int, kind: str) -> Any:
    if kind[0] == "*":
        return tensor_at(ctypes.c_uint64.from_address(address).value, kind)
    return (ctypes.c_float if kind == "fp32" else ctypes.c_int32).from_address(address).value


def inputs_of(layer: Any, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> Any:
    """The inputs of a MoeLayer in their order."""
    result = [x, ids, gates, layer.replicas, layer.formats]
    for part in (layer.up, layer.down):
        result += part.inputs()
    return result


def batch(layer: Any, tokens: int, top_k: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    experts = len(layer.replicas)
    x = torch.randn(tokens, layer.hidden, generator=random).half()
    ids = torch.rand(tokens, experts, generator=random).argsort(1)[:, :top_k].contiguous()
    return x, ids, torch.rand(tokens, top_k, generator=random)


def example(random: torch.Generator, activation: str = "swiglu", formats: Sequence[int] = (0, 1, 2, 1, 2), **options: Any) -> Any:
    replicas = [[0, 1, 2], [3, -1, -1], [4, -1, -1]]
    sizes = {"hidden": 256, "intermediate": 128} | options
    return reference.example(random, list(formats), activation=activation, replicas=replicas, **sizes)


SMALL, LARGE = ["dispatch_small"], ["dispatch_count", "dispatch_scan", "dispatch_scatter"]
CASES = {
    "one token": (1, 1, "mixed_decode", SMALL, {}),
    "biases": (9, 2, "mixed_decode", SMALL, {"bias": True, "activation": "geglu_tanh"}),
    "a limit": (9, 2, "mixed_decode", SMALL, {"bias": True, "activation": "clamped_swiglu"}),
    "blocks of 64": (9, 3, "mixed_decode_block64", SMALL, {"block": 64, "hidden": 192, "intermediate": 192}),
    "batch tiles": (90, 2, "mixed_batch", SMALL, {"hidden": 128, "intermediate": 64}),
    "prefill tiles": (360, 3, "mixed_prefill", LARGE, {"hidden": 64, "intermediate": 64}),
    "few bits": (9, 2, "few_decode", SMALL, {"formats": (5, 1, 6, 2, 0), "bias": True}),
    "only int3, blocks of 64": (
        9,
        3,
        "few_decode",
        SMALL,
        {"formats": (5,) * 5, "block": 64, "hidden": 192, "intermediate": 192},
    ),
    "few bits without prefill tiles": (
        360,
        3,
        "few_batch",
        LARGE,
        {"formats": (6, 5, 6, 2, 5), "hidden": 64, "intermediate": 64},
    ),
}
