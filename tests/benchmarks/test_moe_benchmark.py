"""How benchmarks/moe_layer.py summarizes its rows, and how it passes our weights to llama.cpp."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import llama_cpp_layer
import moe_goals
import moe_layer
import moe_variants

from rq_compile.quantization.formats import Format
from rq_compile.quantization.packing import dequantize
from rq_compile.quantization.quantizer import quantize
from rq_compile.rewrite import slot_weights


def cell(tokens: int, format: str = "int4", routing: str = "uniform", threads: int = 1, **ms: float) -> list[dict]:
    """Rows of variants that take ``ms``; ours takes 1 and has the roofline 0.8."""
    names = {"ours": "rq.moe", "fp32_activations": "rq.moe fp32 activations", "llama": "llama.cpp Q4_0"}
    head = {"shape": "OLMoE", "tokens": tokens, "format": format, "threads": threads, "routing": routing}
    times = {"ours": 1.0, **ms}
    return [head | {"variant": names.get(name, name), "ms": time, "roofline": 0.8 / time} for name, time in times.items()]


def test_summary_gives_the_range_of_each_goal_and_how_many_cells_reach_it() -> None:
    rows = [
        *cell(1, fp32_activations=0.5),
        *cell(16, QMoE=1.4, MatMulNBits=1.2, llama=3.0, fp32_activations=0.5),
        *cell(16, QMoE=1.6, MatMulNBits=1.9, llama=1.0, threads=2),
        *cell(1024, QMoE=9.0),
        *cell(16, routing="skewed", ours=1.2),
        *cell(16, routing="even", QMoE=9.0),
        *cell(16, routing="skewed", threads=2, ours=1.9),
        *cell(16, routing="even", threads=2, ours=2.0),
        *cell(16, "mixed", routing="skewed", ours=9.0),
        *cell(16, "mixed", routing="even"),
        *cell(256, routing="skewed"),
    ]
    assert moe_goals.summary(rows) == [
        "1 token: fraction of the read bandwidth: 0.80 to 0.80 (at least 0.9: 0 of 1 cells)",
        "16 tokens, int4: times as fast as the best stock variant: 1.20 to 1.60 (at least 1.5: 1 of 2 cells)",
        "16 tokens, int4: times as fast as llama.cpp: 1.00 to 3.00 (at least 1.5: 1 of 2 cells)",
        "1024 tokens: fraction of the peak: 0.80 to 0.80 (at least 0.6: 1 of 1 cells)",
        "skewed over even routing of the same experts, time: 0.95 to 1.20 (at most 1.1: 1 of 2 cells)",
    ]


@pytest.mark.parametrize("tokens", [1, 16, 250])
@pytest.mark.parametrize("shape", moe_layer.SHAPES, ids=lambda shape: shape.name)
def test_even_routing_touches_the_experts_of_skewed_routing(shape: moe_layer.Shape, tokens: int) -> None:
    skewed, even = (moe_layer.batch(shape, tokens, routing, seed=3) for routing in ("skewed", "even"))
    np.testing.assert_array_equal(np.unique(even.ids), np.unique(skewed.ids))
    load = np.bincount(even.ids.reshape(-1))
    assert np.ptp(load[load > 0]) <= 1
    assert all(len(set(chosen)) == shape.top_k for chosen in even.ids.tolist())


def test_summary_of_no_rows_is_empty() -> None:
    assert moe_goals.summary([]) == []


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("columns", [256, 96])
def test_blocks_of_llama_cpp_hold_our_weights(format: Format, columns: int) -> None:
    quantized = quantize(np.random.default_rng(0).standard_normal((5, columns), np.float32), format)
    packed = llama_cpp_layer.blocks(quantized, format)
    assert packed.shape == (5, columns // 32, 34 if format == "int8" else 18)

    scales = packed[..., :2].copy().view(np.float16).astype(np.float32)
    numbers = packed[..., 2:].astype(np.int32)
    signed = numbers - 256 * (numbers > 127)
    nibbles = np.concatenate([numbers % 16, numbers // 16], axis=-1) - 8  # the first half of a block is in the low ones
    q = signed if format == "int8" else nibbles
    np.testing.assert_allclose((q * scales).reshape(5, columns), dequantize(quantized, format, columns), rtol=1e-3)


@pytest.mark.parametrize("format", moe_layer.FORMATS)
def test_every_variant_of_a_small_layer_computes_the_same(format: str, tmp_path: Path) -> None:
    shape = moe_layer.Shape("small", 128, 64, 8, 2)
    built = moe_layer.variants(moe_variants.Builder(shape, tmp_path), format, 1, None, full=True)
    moe_layer.check(built, moe_layer.batch(shape, 5, "uniform", seed=0))
    # torch and the stock Gemm alone take weights in 16 bits, and fp8 has no fp32 activations to choose.
    assert len(built) >= (2 if format == "fp8" else 3 if format in ("fp16", "bf16") else 4)


@pytest.mark.parametrize("lowering", ["native", "stock"])
def test_a_layer_is_built_with_the_package_left_as_it_was(lowering: str, tmp_path: Path) -> None:
    before = dict(vars(slot_weights))
    builder = moe_variants.Builder(moe_layer.Shape("small", 32, 48, 4, 2), tmp_path)
    assert vars(slot_weights) == before
    builder.rewritten("int8", lowering, 8, 1)
    assert vars(slot_weights) == before
