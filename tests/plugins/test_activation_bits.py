"""ExpertGemm with rounded activations: exact products of the rounded numbers, and their distance from those of fp32."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from op_nodes import GATED, Weights, assert_close, expert_gemm, pack, python_with, reference, routed

from rq_compile.quantization.formats import block_size


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


E2M1 = [sign * magnitude for sign in (1, -1) for magnitude in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """float64 ``x`` as int8 activations stand for it: per row and block, the largest magnitude is 127."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)
    largest = np.abs(padded).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    values = np.rint(padded * inverse).astype(np.float64) * (largest / np.float32(127)).astype(np.float64)
    return values.reshape(len(x), -1)[:, : x.shape[1]]


def rounded_reference(
    x: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    weights: Weights,
    bias: np.ndarray | None = None,
    *,
    block: int,
    gather: int = 0,
    **attributes: Any,
) -> np.ndarray:
    """Slots of bf16 round x to bf16, those of other floats and of fp8 leave it unchanged."""
    floats = weights.inputs["float_weights"]
    as_floats = x.astype(floats.dtype).astype(np.float32) if floats is not None and floats.dtype == ml_dtypes.bfloat16 else x
    exact = reference(as_floats, rows, offsets, weights, bias, gather=gather, **attributes)
    unchanged = reference(x, rows, offsets, weights, bias, gather=gather, **attributes)
    coarse = reference(rounded(x, block), rows, offsets, weights, bias, gather=gather, **attributes)
    for slot, format in enumerate(weights.formats):
        here = slice(offsets[slot], offsets[slot + 1])
        if format in (0, 4):
            coarse[here] = (exact if format == 0 else unchanged)[here]
    return coarse


@pytest.mark.parametrize("columns", [128, 48, 40, 37, 3, 300])
@pytest.mark.parametrize("gather", [0, 1])
@pytest.mark.parametrize(
    ("formats", "float_type"),
    [
        ([1, 1], np.float32),
        ([2, 2], np.float32),
        ([3, 3], np.float32),
        ([4, 4], np.float32),
        ([5, 5], np.float32),
        ([6, 6], np.float32),
        ([6, 0, 5, 2, 6, 5], ml_dtypes.bfloat16),
        ([0, 1, 4, 3, 4, 2], ml_dtypes.bfloat16),
        ([0, 1, 2, 3, 0, 2], np.float32),
        ([0, 1, 2, 3, 0, 2], ml_dtypes.bfloat16),
        ([0, 0], np.float16),
    ],
)
def test_every_format_rounded(rng: np.random.Generator, columns: int, gather: int, formats: list[int], float_type: Any) -> None:
    weights = pack(rng, formats, 35, columns, float_type)
    rows, offsets = routed(rng, 29, 2, len(formats))
    x = rng.normal(size=(29 if gather else 58, columns)).astype(np.float32)
    y = expert_gemm(x, rows, offsets, weights, gather=gather, activation_bits=8)
    assert_close(y, rounded_reference(x, rows, offsets, weights, block=block_size(columns), gather=gather))


@pytest.mark.parametrize("block", [16, 32, 48, 128, 1024])
def test_every_block_rounded(rng: np.random.Generator, block: int) -> None:
    weights = pack(rng, [1, 2, 3, 5, 6], 20, 2 * block, block=block)
    rows, offsets = routed(rng, 20, 1, 5)
    # Including the largest products that must fit into the kernels' 16 and 32 bits.
    x = rng.choice([-1.0, 1.0, 0.37], size=(20, 2 * block)).astype(np.float32)
    for name, low in (("int8", 1), ("int4", 0), ("mxfp4", 0xF7), ("int3", 0xFF), ("int2", 0xFF)):
        weights.inputs[f"{name}_packed"][:, :, ::2] = low
    y = expert_gemm(x, rows, offsets, weights, activation_bits=8)
    exact = pack_values(weights, block)
    assert_close(y, rounded_reference(x, rows, offsets, exact, block=block))


def pack_values(weights: Any, block: int) -> Any:
    """``weights`` with the values of its packed form, read back according to the definition of the layout."""
    for place, name in enumerate(("int8", "int4", "mxfp4", "int3", "int2")):
        packed, scales = weights.inputs[f"{name}_packed"][0], weights.inputs[f"{name}_scales"][0]
        for n, k in np.ndindex(weights.exact.shape[1:]):
            panel, row = divmod(n, 16)
            if name == "int8":
                q = int(packed[panel, k // 4, 4 * row + k % 4]) - 128.0
            elif name == "int2":
                q = (int(packed[panel, k // 16, 4 * row + k % 4]) >> k % 16 // 4 * 2 & 3) - 2.0
            elif name == "int3":
                words, (number, column) = packed[panel, :, 4 * row + k % 4].tolist(), divmod(k, block)
                q = code_of_3_bits(words, number, column, block) - 4.0
            else:
                byte = int(packed[panel, k // 8, 4 * row + k % 4])
                code = byte & 15 if k % 8 < 4 else byte >> 4
                q = code - 8.0 if name == "int4" else E2M1[code]
            scale = float(scales[panel, k // block, row])
            weights.exact[place, n, k] = q * (2 ** (scale - 127) if name == "mxfp4" else scale)
    return weights


def code_of_3_bits(words: list[int], number: int, column: int, block: int) -> int:
    """``words``: the byte of the column in each word of its row. ``number``: that of the column's block."""
    first, second, third = [*words, 0, 0][number * -(-block * 3 // 32) + column // 32 * 3 :][:3]
    four = column % 32 // 4
    if four < 6:
        return (first, second, third)[four // 2] >> four % 2 * 3 & 7
    return (first >> 6 | second >> 4 & 4) if four == 6 else (third >> 6 | second >> 5 & 4)


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu", "relu"])
def test_bias_and_activation_rounded(rng: np.random.Generator, activation: str) -> None:
    weights = pack(rng, [1, 2, 3, 5, 6], 42, 64, gated=activation in GATED)
    bias = rng.normal(size=(5, 42)).astype(np.float32)
    rows, offsets = routed(rng, 15, 2, 5)
    x = rng.normal(size=(15, 64)).astype(np.float32)
    y = expert_gemm(x, rows, offsets, weights, bias, activation=activation, gather=1, activation_bits=8)
    assert_close(y, rounded_reference(x, rows, offsets, weights, bias, block=64, activation=activation, gather=1))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 17, 64, 71])
@pytest.mark.parametrize("columns", [1, 2, 255, 256, 257, 600])
def test_bf16_of_any_number_of_rows(rng: np.random.Generator, tokens: int, columns: int) -> None:
    weights = pack(rng, [0, 0, 0], 105, columns, ml_dtypes.bfloat16)
    rows, offsets = np.arange(tokens, dtype=np.int32), np.array([0, 0, tokens, tokens], np.int32)
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    y = expert_gemm(x, rows, offsets, weights, activation_bits=8)
    assert_close(y, rounded_reference(x, rows, offsets, weights, block=16))


def test_error_of_both(rng: np.random.Generator) -> None:
    """The error of rounding activations: less than 1 % of the output's norm at block 128; with fp32 there is none."""
    weights = pack(rng, [1, 2], 64, 1024)
    rows, offsets = routed(rng, 64, 1, 2)
    x = rng.normal(size=(64, 1024)).astype(np.float32)
    exact = reference(x, rows, offsets, weights)
    for bits, limit in ((8, 0.01), (32, 1e-6)):
        error = np.linalg.norm(expert_gemm(x, rows, offsets, weights, activation_bits=bits) - exact) / np.linalg.norm(exact)
        assert error < limit, f"{bits} bits: {error}"


def test_error_of_bf16(rng: np.random.Generator) -> None:
    """The error of rounding activations to bf16: less than 0.2 % of the output's norm; with fp32 there is none."""
    weights = pack(rng, [0, 0], 64, 1024, ml_dtypes.bfloat16)
    rows, offsets = routed(rng, 64, 1, 2)
    x = rng.normal(size=(64, 1024)).astype(np.float32)
    exact = reference(x, rows, offsets, weights)
    for bits, limit in ((8, 0.002), (32, 1e-6)):
        error = np.linalg.norm(expert_gemm(x, rows, offsets, weights, activation_bits=bits) - exact) / np.linalg.norm(exact)
        assert error < limit, f"{bits} bits: {error}"


@pytest.mark.parametrize("float_type", [np.float32, ml_dtypes.bfloat16])
def test_threads_and_batch_mates_do_not_change_a_bit_rounded(rng: np.random.Generator, float_type: Any) -> None:
    weights = pack(rng, [0, 1, 2, 3, 5, 6], 70, 272, float_type, gated=True)
    rows, offsets = routed(rng, 150, 2, 6)
    x = rng.normal(size=(300, 272)).astype(np.float32)
    options: dict[str, Any] = {"activation": "swiglu", "activation_bits": 8}
    one = expert_gemm(x, rows, offsets, weights, **options)
    assert one.tobytes() == expert_gemm(x, rows, offsets, weights, threads=2, **options).tobytes()
    for slot in range(6):
        for count in (1, 2, 3, 5, 9, 13):
            begin = offsets[slot]
            alone = np.array([0] * (slot + 1) + [count] * (6 - slot), np.int32)
            few = expert_gemm(x[begin : begin + count], np.arange(count, dtype=np.int32), alone, weights, **options)
            assert few.tobytes() == one[begin : begin + count].tobytes()


def test_strange_rows_stay_alone_in_bf16(rng: np.random.Generator) -> None:
    weights = pack(rng, [0], 16, 64, ml_dtypes.bfloat16)
    x = rng.normal(size=(8, 64)).astype(np.float32)
    x[1, 5], x[3, 7], x[5], x[6] = np.nan, np.inf, 0, 1e-42
    y = expert_gemm(x, np.arange(8, dtype=np.int32), np.array([0, 8], np.int32), weights, activation_bits=8)
    assert np.isnan(y[1]).all()
    assert not np.isfinite(y[3]).any()
    assert np.isfinite(y[[0, 2, 4, 5, 6, 7]]).all()
    assert (np.abs(y[5:7]) < 1e-35).all()


def test_strange_rows_stay_alone(rng: np.random.Generator) -> None:
    weights = pack(rng, [1, 2, 3, 5, 6], 16, 64)
    x = rng.normal(size=(8, 64)).astype(np.float32)
    x[1, 5], x[3, 7], x[5], x[6] = np.nan, np.inf, 0, 1e-42
    rows, offsets = np.arange(8, dtype=np.int32), np.array([0, 2, 4, 6, 7, 8], np.int32)
    y = expert_gemm(x, rows, offsets, weights, activation_bits=8)
    assert np.isnan(y[[1, 3]]).all()
    assert np.isfinite(y[[0, 2, 4, 7]]).all()
    assert (np.abs(y[5:7]) < 1e-35).all()


PRINT_DIGEST = """
import hashlib, numpy as np
from op_nodes import expert_gemm, pack, routed
rng = np.random.default_rng(3)
weights = pack(rng, [1, 2, 3, 5, 6], 40, 300, gated=True)
rows, offsets = routed(rng, 60, 2, 5)
x = (3 * rng.normal(size=(60, 300))).astype(np.float32)
y = [expert_gemm(x, rows, offsets, weights, activation=a, gather=1, activation_bits=8) for a in ("swiglu", "geglu_tanh")]
print(hashlib.sha256(b"".join(map(np.ndarray.tobytes, y))).hexdigest())
"""


CHECK_BF16 = """
import ml_dtypes, numpy as np
from op_nodes import assert_close, expert_gemm, pack, reference, routed
rng = np.random.default_rng(3)
weights = pack(rng, [0, 0, 0], 40, 301, ml_dtypes.bfloat16)
x = rng.normal(size=(60, 301)).astype(np.float32)
rows, offsets = routed(rng, 60, 1, 3)
y = expert_gemm(x, rows, offsets, weights, activation_bits=8)
assert_close(y, reference(x.astype(ml_dtypes.bfloat16).astype(np.float32), rows, offsets, weights))
"""


@pytest.mark.parametrize("isa", [None, "plain", "avx2"])
def test_every_instruction_set_rounds_x_to_bf16(isa: str | None) -> None:
    result = python_with(isa, "-c", CHECK_BF16)
    assert result.returncode == 0, result.stderr


def test_every_instruction_set_gives_the_same_bits() -> None:
    """Quantized slots: the same bits, whichever instructions this processor has."""
    digests = set()
    for isa in (None, "plain", "avx2"):
        result = python_with(isa, "-c", PRINT_DIGEST)
        assert result.returncode == 0, result.stderr
        digests.add(result.stdout)
    assert len(digests) == 1
