"""Decoding of quantized matrices of any shape, against codes that numpy packs as each format is published, and its arithmetic."""

import ctypes
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rq_compile.checkpoint.safetensors_file import tensors_of
from rq_compile.checkpoint.storage import decoding
from rq_compile.checkpoint.storage.decoding import Codes, Groups, differences, scaled
from rq_compile.checkpoint.storage.packings import AWQ_WORDS, E2M1_PAIRS, INT8, column_words
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.checkpoint.storage.weights import weights_of
from rq_compile.quantization.library import LIBRARY

pytestmark = pytest.mark.quick

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E4M3 = ml_dtypes.float8_e4m3fn
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Case:
    """``values`` fp32: what ``tensors`` and the config's ``settings`` say, every step in fp32."""

    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]
    values: np.ndarray


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of unsigned ``codes`` along the last axis, the first in the lowest bits, the last word filled up with zeros."""
    each = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).astype(np.uint32).reshape(len(codes), -1, each)
    return np.bitwise_or.reduce(codes << np.arange(0, 32, bits, dtype=np.uint32), axis=2).view(np.int32)


def random_of(draw: st.DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32)))


def scales_of(random: np.random.Generator, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    return random.normal(size=shape).astype(dtype)


def worth(numbers: np.ndarray, zeros: np.ndarray | float, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    of_column = zeros[:, groups] if isinstance(zeros, np.ndarray) else zeros
    return (numbers - of_column).astype(np.float32) * scales.astype(np.float32)[:, groups]


@st.composite
def gptq(draw: st.DrawFn) -> Case:
    bits, random = draw(st.sampled_from([4, 8])), random_of(draw)
    rows, columns = (32 // bits * draw(st.integers(1, 24)) for _ in range(2))
    group = draw(st.sampled_from([-1, 8, 24, 32, 128]))
    width = columns if group == -1 else group
    of_column = np.arange(columns) // width
    if draw(st.booleans()):
        random.shuffle(of_column)
    version, count = draw(st.sampled_from(["gptq", "gptq_v2"])), of_column.max() + 1
    codes, stored = random.integers(0, 2**bits, (rows, columns)), random.integers(0, 2**bits, (rows, count))
    zeros, scales = (stored + (version == "gptq")) % 2**bits, scales_of(random, rows, count)
    tensors = {"qweight": packed(codes, bits).T, "qzeros": packed(stored.T, bits), "scales": scales.T}
    tensors |= {"g_idx": of_column.astype(np.int32)}
    return Case(
        tensors, {"group_size": group, "bits": bits, "checkpoint_format": version}, worth(codes, zeros, scales, of_column)
    )


@st.composite
def awq(draw: st.DrawFn) -> Case:
    random = random_of(draw)
    rows, columns, width = 8 * draw(st.integers(1, 40)), draw(st.integers(1, 150)), draw(st.sampled_from([7, 16, 128]))
    of_column = np.arange(columns) // width
    codes, zeros = random.integers(0, 16, (rows, columns)), random.integers(0, 16, (rows, of_column.max() + 1))
    scales = scales_of(random, rows, zeros.shape[1])

    def words(matrix: np.ndarray) -> np.ndarray:
        return packed(matrix.T.reshape(-1, rows // 8, 8)[..., AWQ_ORDER].reshape(-1, rows), 4)

    tensors = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.T}
    return Case(tensors, {"quant_method": "awq", "group_size": width}, worth(codes, zeros, scales, of_column))


@st.composite
def pack_quantized(draw: st.DrawFn) -> Case:
    bits, random = draw(st.sampled_from([4, 8])), random_of(draw)
    rows, columns, width = draw(st.integers(1, 30)), draw(st.integers(9, 1100)), draw(st.sampled_from([1, 5, 16, 32, 128]))
    of_column = np.arange(columns) // width
    ordered, asymmetric, half = draw(st.booleans()), draw(st.booleans()), 2 ** (bits - 1)
    if ordered:
        random.shuffle(of_column)
    codes, zeros = random.integers(0, 2**bits, (rows, columns)), random.integers(0, 2**bits, (rows, of_column.max() + 1))
    scales = scales_of(random, rows, zeros.shape[1], dtype=ml_dtypes.bfloat16)
    tensors = {"weight_packed": packed(codes, bits), "weight_scale": scales, "weight_shape": np.array([rows, columns])}
    tensors |= {"weight_zero_point": packed(zeros.T, bits).T} if asymmetric else {}
    tensors |= {"weight_g_idx": of_column.astype(np.int32)} if ordered else {}
    weights = {"num_bits": bits, "group_size": width, "symmetric": not asymmetric, "actorder": "group" if ordered else None}
    settings = {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    return Case(tensors, settings, worth(codes, zeros if asymmetric else half, scales, of_column))


@st.composite
def row_pairs(draw: st.DrawFn) -> Case:
    random = random_of(draw)
    rows, columns, width = 2 * draw(st.integers(1, 20)), 16 * draw(st.integers(1, 70)), 16
    numbers, scales = random.integers(-8, 8, (rows, columns)), scales_of(random, rows, columns // width)
    codes = (numbers & 15).astype(np.uint8)
    tensors = {"weight": codes[0::2] | codes[1::2] << np.uint8(4), "weight_scale": scales}
    return Case(tensors, {"quant_method": "modelopt"}, worth(numbers, 0, scales, np.arange(columns) // width))


@st.composite
def nvfp4(draw: st.DrawFn) -> Case:
    random, divides = random_of(draw), draw(st.booleans())
    rows, columns = draw(st.integers(1, 40)), 2 * draw(st.integers(1, 600))
    codes = random.integers(0, 16, (rows, columns)).astype(np.uint8)
    scales = random.integers(0, 0x7F, (rows, -(-columns // 16))).astype(np.uint8).view(E4M3)
    factor = np.float32(abs(random.normal()) + 0.01)
    tensors = {"weight_packed" if divides else "weight": codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), "weight_scale": scales}
    tensors["weight_global_scale" if divides else "weight_scale_2"] = np.array([factor])
    both = scales.astype(np.float32) / factor if divides else scales.astype(np.float32) * factor
    numbers = np.where(codes < 8, 1, -1) * E2M1[codes & 7]
    return Case(tensors, {}, worth(numbers, 0, both, np.arange(columns) // 16))


@st.composite
def fp8(draw: st.DrawFn) -> Case:
    random = random_of(draw)
    rows, columns = draw(st.integers(129, 300)), draw(st.integers(129, 1100))
    codes = (random.integers(0, 0x7F, (rows, columns)) | random.integers(0, 2, (rows, columns)) << 7).astype(np.uint8).view(E4M3)
    grid = random.normal(size=(-(-rows // 128), -(-columns // 128))).astype(np.float32)
    by_row = np.repeat(grid, 128, axis=0)[:rows]
    return Case(
        {"weight": codes, "weight_scale_inv": grid}, {}, worth(codes.astype(np.float32), 0, by_row, np.arange(columns) // 128)
    )


@pytest.fixture(params=["avx512", "avx2", "plain"])
def isa(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this processor does not have falls back to ``plain``. A copy of the library chooses for itself."""
    monkeypatch.setenv("RQ_QUANTIZER_ISA", request.param)
    copied = ctypes.CDLL(str(shutil.copy(LIBRARY, tmp_path / f"{request.param}.so")))
    monkeypatch.setattr(decoding, "quantizer_function", lambda name: copied[name])
    return request.param


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case_of", [gptq, awq, pack_quantized, row_pairs, nvfp4, fp8], ids=lambda made: made.__name__)
def test_any_shape_is_decoded_bit_for_bit(case_of: Callable[[], st.SearchStrategy[Case]]) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(case=case_of(), ends=st.tuples(st.integers(0, 400), st.integers(0, 400)))
    def check(case: Case, ends: tuple[int, int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_file({f"m.{part}": np.ascontiguousarray(tensor) for part, tensor in case.tensors.items()}, file)
            (weight,) = weights_of(tensors_of(file), Stated(case.settings, file)).values()
            assert weight.shape == case.values.shape
            every = slice(0, len(case.values))
            some = slice(*sorted(min(end, len(case.values)) for end in ends))
            for rows in (every, some):
                np.testing.assert_array_equal(weight.decode(rows), case.values[rows])
            if (integers := weight.source_numbers(some)) is not None:
                scales = np.repeat(integers.scales, integers.group, axis=1)[:, : case.values.shape[1]]
                np.testing.assert_array_equal(integers.numbers * scales, case.values[some])

    check()


def test_a_difference_that_no_byte_holds_is_no_whole_number() -> None:
    codes = Codes(INT8, np.array([[127, 0, 0x80]], np.uint8), 0, 1, 3)
    ones = np.ones((1, 1), np.float32)
    held, outside = (Groups(3, ones, np.array([[zero]], np.int8)) for zero in (0, 1))
    np.testing.assert_array_equal(differences(codes, held), [[127, 0, -128]])
    assert differences(codes, outside) is None
    np.testing.assert_array_equal(scaled(codes, outside), [[126, -1, -129]])


@pytest.mark.parametrize(
    "codes",
    [
        Codes(INT8, np.zeros((4, 6), np.uint8), 1, 4, 6),
        Codes(E2M1_PAIRS, np.zeros((4, 3), np.uint8), 0, 4, 7),
        Codes(AWQ_WORDS, np.zeros((6, 2), np.int32), 8, 9, 6),
        Codes(column_words(4), np.zeros((2, 5), np.int32), 0, 5, 17),
    ],
    ids=["rows", "pairs", "awq", "gptq"],
)
def test_no_word_beyond_the_tensor_is_read(codes: Codes) -> None:
    with pytest.raises(IndexError, match="words"):
        scaled(codes, Groups(1, np.ones((codes.rows, codes.columns), np.float32)))


@pytest.mark.parametrize(("width", "order"), [(2, None), (8, [0, 1, 2, 0]), (8, [-1, 0, 0, 0])])
def test_no_group_beyond_the_scales_is_read(width: int, order: list[int] | None) -> None:
    groups = Groups(width, np.ones((3, 1 if order is None else 2), np.float32), order=None if order is None else np.array(order))
    with pytest.raises(IndexError, match="scales"):
        scaled(Codes(INT8, np.zeros((3, 4), np.uint8), 0, 3, 4), groups)
