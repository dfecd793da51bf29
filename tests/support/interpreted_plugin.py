"""The TensorRT plugin's launches, computed by Triton's interpreter: test_tensorrt_plugins.py runs this file.

RQ_PLUGIN and RQ_HOST are the paths of the parts; for the others see interpreted_launches.py.
"""

import ctypes
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import moe_nodes
import numpy as np
import one_layer
import pytest
import torch
from interpreted_launches import CASES, DRIVER, LAUNCHED, SEED, Launches, batch, example, inputs_of
from rq_kernels import reference, tiles

from rq_compile.architectures.geometry import Activation

CODES = {torch.float32: 0, torch.float16: 1, torch.uint8: 2, torch.int32: 3, torch.int64: 8}  # nvinfer1::DataType; bytes are INT8
GUARD = 4096
HOST = ctypes.CDLL(os.environ["RQ_HOST"])


class Tensor(ctypes.Structure):
    """``nvinfer1::PluginTensorDesc``."""

    _fields_ = [
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


def enqueue(
    layer: Any,
    x: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    launches: Any,
    room: int = 1 << 22,
    shares: list[float] | None = None,
    inputs: Any = None,
) -> tuple[Any, torch.Tensor]:
    """The plugin's result for a batch, with a workspace of exactly the size that it declared."""
    inputs = inputs or inputs_of(layer, x, ids, gates)
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


@pytest.mark.parametrize("case", CASES)
def test_enqueue_against_float64(case: Any) -> None:
    options: Any
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
        *dispatch, f"up_gated_fp16_{size}", f"down_fp16_{size}", "combine_fp16"
    ]  # fmt: skip
    expected = reference.moe_layer(x, ids, gates, held)
    assert (out.double() - expected).abs().max() < 2e-3 * expected.abs().max(), f"seed {SEED}"


@pytest.mark.parametrize(
    ("activation", "slots", "products"),
    [
        ("swiglu", one_layer.MIXED, ["up_gated_fp16_mixed_decode", "down_fp16_mixed_decode_block64"]),
        ("clamped_swiglu", one_layer.FEW_BITS, ["up_gated_fp16_few_decode", "down_fp16_few_decode"]),
    ],
)
def test_a_node_that_the_compiler_writes(activation: Activation, slots: Any, products: list[str], tmp_path: Path) -> None:
    """From serialized bytes to the result, which is that of the weights before packing."""
    geometry = moe_nodes.geometry_of(activation, bias=activation == "clamped_swiglu")
    geometry = geometry.model_copy(update={"alpha": 1.702})  # rq_enqueue gives no other
    model, experts = moe_nodes.compiled_layer(geometry, slots, tmp_path)
    (node,), constants = moe_nodes.moe_nodes(model), moe_nodes.constants_of(model)
    x, ids, gates = one_layer.batch(geometry, 9, seed=SEED)
    x = x.astype(np.float16)
    inputs = moe_nodes.arrays_of(node, constants, x, ids, gates)
    launches = Launches()
    step, out = enqueue(moe_nodes.exact(node, constants).layer, inputs[0], inputs[1], inputs[2], launches, inputs=inputs)
    assert step == 0
    assert [name for name, *_ in launches.seen][1:3] == products
    wanted = one_layer.reference(x, ids, gates, geometry, slots, experts)
    assert np.abs(out.numpy().astype(np.float64) - wanted).max() < 2e-3 * np.abs(wanted).max(), f"seed {SEED}"


def test_no_token_no_launch() -> None:
    held = example(torch.Generator().manual_seed(SEED))
    launches = Launches()
    step, _ = enqueue(held.layer, *batch(held.layer, 0, 2, torch.Generator()), launches)
    assert (step, launches.seen) == (0, [])


@pytest.mark.parametrize("shares", [None, [0.875, 0.03125, 0.03125, 0.03125, 0.03125]])
@pytest.mark.parametrize("tokens", [1, 7, 20, 60, 200, 511, 512, 513, 3000])
def test_tiles_and_grids_are_those_of_the_rule(tokens: int, shares: list[float] | None) -> None:
    """Nothing is computed. This only checks which kernels are chosen, and the number of programs."""
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
def test_a_cubin_for_its_major_number_and_ptx_for_later_ones(sm: int, kind: str) -> None:
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


def test_a_launch_that_fails_is_told() -> None:
    held = example(torch.Generator().manual_seed(SEED))
    launches = Launches(compute=False)
    launches.function = LAUNCHED(lambda *_: 1)
    DRIVER.stand_in(80, launches.function)
    step, _ = enqueue(held.layer, *batch(held.layer, 3, 2, torch.Generator()), launches)
    assert step == 5
