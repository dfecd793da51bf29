"""The GPU kernels in Triton's interpreter. test_kernels.py runs this file, in a Python whose Triton interprets."""

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("plugins/kernels", "benchmarks")]

import gpu_moe_layer as benchmark
import op_nodes
from rq_kernels import cases, launch, reference, tiles
from rq_kernels.variants import variants

from rq_compile.quantization.formats import SLOT_FORMATS, Format, block_size
from rq_compile.quantization.packing import in_planes
from rq_compile.quantization.quantizer import quantize, stored

SEED = secrets.randbits(32)
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def bfloat16(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter keeps bf16 as bits, multiplies these as integers and truncates; make it behave like a GPU."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    multiply, cast = builder.create_dot, builder.cast_impl

    def numbers(operand: Any) -> Any:
        if operand.dtype.scalar.name != "bf16":
            return operand
        return handle((operand.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def rounding_cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar.name == "fp32" and kind.scalar.name == "bf16":
            return handle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), kind.scalar)
        return cast(self, source, kind)

    monkeypatch_module.setattr(builder, "create_dot", lambda self, a, b, *rest: multiply(self, numbers(a), numbers(b), *rest))
    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch_module.setattr(builder, name, rounding_cast)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_stage_against_float64(case: Any) -> None:
    errors = cases.worst(case, SEED)
    assert all(error <= 1 for error in errors.values()), f"seed {SEED}: {errors}"


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """A replica table whose slots are in random order, the number of slots, and ids."""
    copies = draw(st.lists(st.integers(1, 4), min_size=1, max_size=70))
    slots = draw(st.permutations(range(sum(copies) + draw(st.integers(0, 2)))))
    table, places = np.full((len(copies), max(copies)), -1, np.int32), iter(slots)
    for expert, count in enumerate(copies):
        table[expert, :count] = [next(places) for _ in range(count)]
    tokens, top_k = draw(st.integers(0, 150)), draw(st.integers(1, 4))
    ids = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, len(copies), (tokens, top_k))
    if draw(st.booleans()):
        ids[:] = draw(st.integers(0, len(copies) - 1))
    return ids, table, len(slots)


@settings(max_examples=25, deadline=None)
@given(tables(), st.sampled_from([16, 64, 128]), st.sampled_from([0, 10**6]))
def test_dispatch_gives_the_slots_of_the_cpu_op(
    drawn: tuple[np.ndarray, np.ndarray, int], rows_per_tile: int, small: int
) -> None:
    ids, table, slots = drawn
    small = small if len(ids) else 1
    routed = launch.route(torch.from_numpy(ids), torch.from_numpy(table), slots, rows_per_tile, small)
    rows, offsets = op_nodes.dispatch(ids, table, slots)
    np.testing.assert_array_equal(routed.rows.numpy(), rows)
    np.testing.assert_array_equal(routed.offsets.numpy(), offsets)
    assert cases.covers(routed, torch.from_numpy(offsets), rows_per_tile)


def test_dispatch_of_many_slots_and_chunks() -> None:
    random = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 150, (1700, 3), generator=random)
    table = torch.arange(300, dtype=torch.int32).reshape(2, 150).T.contiguous()
    routed = launch.route(ids, table, 300, 16)
    rows, offsets = reference.grouped(reference.routed_slots(ids, table), 300)
    assert torch.equal(routed.rows, rows)
    assert torch.equal(routed.offsets, offsets)
    assert cases.covers(routed, offsets, 16)


def test_weights_that_the_compiler_packs() -> None:
    """The kernels read what ``quantize`` packs; two slots may share a matrix."""
    random = np.random.default_rng(SEED)
    matrices = {"up": (random.normal(size=(2, 128, 192)) / 14), "down": random.normal(size=(2, 192, 64)) / 8}

    def projection(name: str) -> Any:
        held: dict[str, torch.Tensor] = {}
        for expert, format in set(of_slots):
            made = quantize(matrices[name][expert].astype(np.float32), format)
            codes = in_planes(made.packed, SLOT_FORMATS[format].bits, made.scales.shape[1])
            held |= {f"{format}_packed": torch.from_numpy(codes)[None], f"{format}_scales": torch.from_numpy(made.scales)[None]}
        return launch.Projection(torch.zeros(5, dtype=torch.int32), held, block=block_size(matrices[name].shape[2]))

    of_slots: list[tuple[int, Format]] = [(1, "int4"), (0, "int8"), (1, "int4"), (0, "int3"), (1, "int2")]
    formats, replicas = torch.tensor([2, 1, 2, 5, 6], dtype=torch.int32), torch.tensor([[1, 3, -1], [0, 2, 4]], dtype=torch.int32)
    layer = launch.Layer(192, 64, "swiglu", formats, replicas, projection("up"), projection("down"))
    exact = {name: torch.from_numpy(np.stack([stored(w[e], f) for e, f in of_slots])).double() for name, w in matrices.items()}
    x, ids, gates = torch.randn(12, 192).half(), torch.randint(0, 2, (12, 2)), torch.rand(12, 2)
    ours = launch.moe_layer(x, ids, gates, layer, "decode").double()
    expected = reference.moe_layer(x, ids, gates, reference.Example(layer, exact["up"], exact["down"]))
    assert (ours - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("formats", "block"),
    [([3], 32), ([0], 128), ([1], 128), ([2], 64), ([4], 64), ([1, 2], 128), ([5], 128), ([6, 0], 64), ([6, 5, 1, 2, 0], 128)],
)
def test_what_is_launched_is_what_is_built(formats: list[int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants, warps and stages of both products, with all tiles that an engine has for the layer."""
    built = [v.constants | {"num_warps": v.warps, "num_stages": v.stages} for v in variants(["fp16"])]
    seen: list[dict[str, Any]] = []
    recorder = type("Recorder", (), {"__getitem__": lambda self, grid: lambda *values, **given: seen.append(given)})()
    for name in ("expert_up", "expert_down"):
        monkeypatch.setattr(launch.expert_gemm, name, recorder)
    random = torch.Generator().manual_seed(SEED)
    held = reference.example(random, formats, 128, 192, "swiglu", block=block)
    x, ids, gates = torch.randn(3, 128).half(), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    for size in held.layer.sizes:
        launch.moe_layer(x, ids, gates, held.layer, size)
    assert len(seen) == 2 * len(held.layer.sizes) >= 4
    assert all(given in built for given in seen)


def test_most_tiles_is_reached_and_never_passed() -> None:
    random = np.random.default_rng(SEED)
    for _ in range(300):
        slots, rows = int(random.integers(1, 9)), int(random.choice([16, 64]))
        loads = random.integers(0, 3 * rows, slots).tolist()
        assert tiles.tile_count(loads, rows) <= tiles.most_tiles(sum(loads), slots, rows)
    assert tiles.tile_count([1, 1, 1, 17 + 16], 16) == tiles.most_tiles(36, 4, 16)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_the_benchmark_compares_like_with_like(format: Any) -> None:
    """Both baselines and our kernels compute one layer, made as the benchmark makes it."""
    shape = benchmark.Shape("small", 256, 128, 4, 2)
    formats = benchmark.formats_of(shape, format)
    held = benchmark.layer(shape, formats, "cpu")
    ids = benchmark.routing(shape, 5, "uniform", SEED)
    inputs = torch.randn(5, 256).bfloat16(), ids, torch.rand(5, 2)
    built = benchmark.variants(held, format, "decode")
    assert len(built) == (6 if format == "bf16" else 5)
    slow = [name for name in built if name.startswith(("fused MoE (64", "fused MoE (128"))]
    benchmark.check({name: run for name, run in built.items() if name not in slow}, inputs)


@pytest.mark.parametrize(
    ("format", "index"), [("mixed", [0, 0, 1, 0, 1, 2, 3, 4]), ("few", [0, 0, 0, 1, 2, 0, 1, 2]), ("int3", list(range(8)))]
)
def test_the_benchmark_runs_what_only_ours_can(format: str, index: list[int]) -> None:
    shape = benchmark.Shape("small", 256, 128, 8, 2)
    formats = benchmark.formats_of(shape, format)
    held = benchmark.layer(shape, formats, "cpu")
    assert held.up.index.tolist() == index
    built = benchmark.variants(held, format, "decode")
    assert list(built) == [benchmark.OURS]
    run = built[benchmark.OURS]
    answer = run(torch.randn(3, 256).bfloat16(), benchmark.routing(shape, 3, "skewed", SEED), torch.rand(3, 2))
    assert answer.shape == (3, 256)
    assert answer.isfinite().all()
