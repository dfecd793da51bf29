"""The TensorRT plugin's launches, computed by Triton's interpreter: test_tensorrt_plugins.py runs this file.

A libcuda.so.1 of the tests' own (cuda_stand_in.cc) hands over each launch: the image, the grid and the parameters. RQ_PLUGIN,
RQ_HOST, RQ_STAND_IN and RQ_KERNELS say where the parts are.
"""

import ctypes
import hashlib
import json
import os
import secrets
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "plugins" / "kernels"))

from rq_kernels import reference, tiles
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
CODES = {torch.float32: 0, torch.float16: 1, torch.uint8: 2, torch.int32: 3, torch.int64: 8}  # nvinfer1::DataType; bytes are INT8
GUARD = 4096


class Tensor(ctypes.Structure):
    """``nvinfer1::PluginTensorDesc``."""

    _fields_ = [
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
# Its name is libcuda.so.1, so the plugin's dlopen finds it loaded.
DRIVER = ctypes.CDLL(os.environ["RQ_STAND_IN"], mode=ctypes.RTLD_GLOBAL)
HOST = ctypes.CDLL(os.environ["RQ_HOST"])


def image_kernel(address):
    """The entry of kernels.json whose cubin or PTX lies there, and which of both it is."""
    if ctypes.string_at(address, 4) != b"\x7fELF":
        return IMAGES[hashlib.sha256(ctypes.string_at(address)).hexdigest()], "ptx"
    header = ctypes.string_at(address, 64)
    programs, sections = struct.unpack_from("<QQ", header, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", header, 54)
    size = max(programs + program_size * program_count, sections + section_size * section_count)
    return IMAGES[hashlib.sha256(ctypes.string_at(address, size)).hexdigest()], "cubin"


def tensor_at(address, kind):
    """A tensor whose data begin at ``address``; the interpreter asks for no more."""
    if not address:
        return torch.empty(0, dtype=DTYPES[kind])
    size = torch.empty(0, dtype=DTYPES[kind]).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=DTYPES[kind])


class Launches:
    """What was launched: ``(name, kind of image, grid)``. ``compute``: do what the kernels do."""

    def __init__(self, sm=80, compute=True):
        self.seen, self.compute, self.failure = [], compute, None
        self.function = LAUNCHED(self.launched)
        DRIVER.stand_in(sm, self.function)

    def launched(self, image, entry, grid, threads, shared, parameters):
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


def read(address, kind):
    if kind[0] == "*":
        return tensor_at(ctypes.c_uint64.from_address(address).value, kind)
    return (ctypes.c_float if kind == "fp32" else ctypes.c_int32).from_address(address).value


def inputs_of(layer, x, ids, gates):
    """The plugin's inputs in their order."""
    result = [x, ids, gates, layer.replicas, layer.formats]
    for part in (layer.up, layer.down):
        result.append(part.index)
        result += [
            t for t in (part.float_weights, part.int8_packed, part.int8_scales, part.int4_packed, part.int4_scales, part.bias)
            if t is not None
        ]  # fmt: skip
    return result


def enqueue(layer, x, ids, gates, launches, room=1 << 22, shares=None):
    """The plugin's answer to a batch, from a workspace of the size that it declared and not a byte more."""
    inputs = inputs_of(layer, x, ids, gates)
    described = [Tensor(t.dim(), (ctypes.c_int64 * 8)(*t.shape), CODES[t.dtype], 0, 1.0) for t in inputs]
    formats = layer.formats.tolist()
    out = torch.full_like(x, float("nan"))
    workspace = torch.full((room,), 0xA5, dtype=torch.uint8)
    asked = ctypes.c_size_t(room - GUARD)
    step = HOST.rq_enqueue(
        os.environ["RQ_PLUGIN"].encode(), (ctypes.c_int32 * len(formats))(*formats),
        (ctypes.c_float * len(formats))(*shares) if shares else None, len(formats), layer.activation.encode(),
        ctypes.c_float(layer.limit), (Tensor * len(inputs))(*described), len(inputs), ctypes.c_int64(len(x)),
        (ctypes.c_void_p * len(inputs))(*[t.data_ptr() for t in inputs]), ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(workspace.data_ptr()), ctypes.byref(asked),
    )  # fmt: skip
    if launches.failure:
        raise launches.failure
    assert (workspace[asked.value :] == 0xA5).all(), "written beyond the declared workspace"
    return step, out


def batch(layer, tokens, top_k, random):
    experts = len(layer.replicas)
    x = torch.randn(tokens, layer.hidden, generator=random).half()
    ids = torch.rand(tokens, experts, generator=random).argsort(1)[:, :top_k].contiguous()
    return x, ids, torch.rand(tokens, top_k, generator=random)


def example(random, activation="swiglu", **options):
    replicas = [[0, 1, 2], [3, -1, -1], [4, -1, -1]]
    sizes = {"hidden": 256, "intermediate": 128} | options
    return reference.example(random, [0, 1, 2, 1, 2], activation=activation, replicas=replicas, **sizes)


SMALL, LARGE = ["dispatch_small"], ["dispatch_count", "dispatch_scan", "dispatch_scatter"]
CASES = {
    "one token": (1, 1, "decode", SMALL, {}),
    "biases": (9, 2, "decode", SMALL, {"bias": True, "activation": "geglu_tanh"}),
    "a limit": (9, 2, "decode", SMALL, {"bias": True, "activation": "clamped_swiglu"}),
    "blocks of 64": (9, 3, "decode_block64", SMALL, {"block": 64, "hidden": 192, "intermediate": 192}),
    "batch tiles": (90, 2, "batch", SMALL, {"hidden": 128, "intermediate": 64}),
    "prefill tiles": (360, 3, "prefill", LARGE, {"hidden": 64, "intermediate": 64}),
}


@pytest.mark.parametrize("case", CASES)
def test_enqueue_against_float64(case):
    tokens, top_k, size, dispatch, options = CASES[case]
    random = torch.Generator().manual_seed(SEED)
    held = example(random, **options)
    held = replace(held, layer=replace(held.layer, limit=0.8))
    x, ids, gates = batch(held.layer, tokens, top_k, random)
    if top_k == 3:
        ids[::3, 0] = -1  # another rank's
    launches = Launches()
    step, out = enqueue(held.layer, x, ids, gates, launches)
    assert step == 0
    assert [name for name, *_ in launches.seen] == [
        *dispatch, f"up_gated_fp16_mixed_{size}", f"down_fp16_mixed_{size}", "combine_fp16"
    ]  # fmt: skip
    expected = reference.moe_layer(x, ids, gates, held)
    assert (out.double() - expected).abs().max() < 2e-3 * expected.abs().max(), f"seed {SEED}"


def test_no_token_no_launch():
    held = example(torch.Generator().manual_seed(SEED))
    launches = Launches()
    step, _ = enqueue(held.layer, *batch(held.layer, 0, 2, torch.Generator()), launches)
    assert (step, launches.seen) == (0, [])


@pytest.mark.parametrize("shares", [None, [0.875, 0.03125, 0.03125, 0.03125, 0.03125]])
@pytest.mark.parametrize("tokens", [1, 7, 20, 60, 200, 511, 512, 513, 3000])
def test_tiles_and_grids_are_those_of_the_rule(tokens, shares):
    """Nothing is computed: which kernels are chosen, and how many programs."""
    random = torch.Generator().manual_seed(SEED)
    held = example(random)
    launches = Launches(compute=False)
    assert enqueue(held.layer, *batch(held.layer, tokens, 2, random), launches, 1 << 23, shares)[0] == 0
    pairs = 2 * tokens
    size = tiles.choose(tiles.expected_rows(shares or [1 / 5] * 5, pairs))
    most = tiles.most_tiles(pairs, 5, tiles.UP[size].rows)
    chunks = -(-pairs // tiles.CHUNK)
    expected = [("dispatch_small", 1, 1)]
    if pairs > tiles.SMALL:
        expected = [("dispatch_count", chunks, 1), ("dispatch_scan", 1, 1), ("dispatch_scatter", chunks, 1)]
    expected += [(f"up_gated_fp16_mixed_{size}", most, -(-128 // tiles.UP[size].outputs))]
    expected += [(f"down_fp16_mixed_{size}", most, -(-256 // tiles.DOWN[size].outputs)), ("combine_fp16", tokens, 1)]
    assert [(name, x, y) for name, _, (x, y, _) in launches.seen] == expected


@pytest.mark.parametrize(("sm", "kind"), [(80, "cubin"), (86, "cubin"), (90, "ptx"), (120, "cubin"), (121, "ptx"), (75, None)])
def test_a_cubin_for_its_major_number_and_ptx_for_later_ones(sm, kind):
    """The cubins of SM 120 are bound to it; the PTX is that of SM 80."""
    held = example(torch.Generator().manual_seed(SEED))
    batches = batch(held.layer, 3, 2, torch.Generator().manual_seed(SEED))
    launches = Launches(sm, compute=False)
    step, _ = enqueue(held.layer, *batches, launches)
    assert step == (0 if kind else 4)  # 4: when the kernels are loaded
    assert {each for _, each, _ in launches.seen} == ({kind} if kind else set())
    before = DRIVER.modules_loaded()
    enqueue(held.layer, *batches, launches)
    assert DRIVER.modules_loaded() == before, "a second layer of the same kernels loads nothing"


def test_a_launch_that_fails_is_told():
    held = example(torch.Generator().manual_seed(SEED))
    launches = Launches(compute=False)
    launches.function = LAUNCHED(lambda *_: 1)
    DRIVER.stand_in(80, launches.function)
    step, _ = enqueue(held.layer, *batch(held.layer, 3, 2, torch.Generator()), launches)
    assert step == 5
