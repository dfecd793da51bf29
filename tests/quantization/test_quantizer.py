"""Formats, packing and the two ways of rounding, compared with plain float64."""

import hashlib
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from command_line import python
from gptq_in_float64 import gptq_in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from instruction_sets import kernels_of

from rq_compile.architectures.layers import ExpertWeights
from rq_compile.calibration.expert import in_format
from rq_compile.checkpoint.storage.decoding import Codes, differences
from rq_compile.checkpoint.storage.packings import INT8
from rq_compile.errors import UserError
from rq_compile.quantization import feedback as feedback_module
from rq_compile.quantization import library
from rq_compile.quantization.formats import BLOCKS, PACKED_FORMATS, QUANTIZED_FORMATS, Format, block_size, matrix_bytes
from rq_compile.quantization.gptq import FEEDBACK
from rq_compile.quantization.packing import dequantize
from rq_compile.quantization.quantizer import carried, quantize, stored
from rq_compile.quantization.second_moment import SecondMoment, block_moment, whole_moment
from rq_compile.quantization.source_numbers import SourceNumbers
from rq_compile.rewrite.slot_weights import quantized

pytestmark = pytest.mark.quick

SHAPES = [(1, 1), (3, 17), (8, 40), (16, 128), (5, 384)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(tokens: int, columns: int, seed: int = 1) -> np.ndarray:
    """Inputs with few directions, and some channels much larger than others, as in activations."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((tokens, 8)) @ random.standard_normal((8, columns)) + 0.3 * random.standard_normal(
        (tokens, columns)
    )
    return (mixed * random.lognormal(0, 1, columns)).astype(np.float32)


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weights_are_the_stored_ones(shape: tuple[int, int], format: Format) -> None:
    weights = normal(*shape)
    inputs = correlated(50, shape[1])
    for block in BLOCKS:
        for moment in (None, whole_moment(inputs), block_moment(inputs, block_size(shape[1]))):
            packed = quantize(weights, format, moment, block)
            kept, size = PACKED_FORMATS[format], block_size(shape[1], block)
            of_words = packed.scales.size * (4 * kept.words(size) - size * kept.bits // 8)  # what is left of the last word
            assert packed.packed.nbytes + packed.scales.nbytes + of_words == matrix_bytes(format, *shape, block)
            assert not of_words or (format, size) == ("int3", 16)
            np.testing.assert_array_equal(dequantize(packed, format, shape[1]), stored(weights, format, moment, block))


@pytest.mark.parametrize(("format", "levels"), [("int8", 127), ("int4", 8)])
def test_rounding_to_the_nearest_errs_by_half_a_step(format: Format, levels: int) -> None:
    weights = normal(20, 256).astype(np.float64)
    largest = np.abs(weights.reshape(20, 2, 128)).max(-1)
    # int4 ends at 7 on one side, where a weight may be off by a whole step.
    bound = largest / levels * (0.5 if format == "int8" else 1.0) * (1 + 1e-5)
    error = np.abs(stored(weights, format) - weights).reshape(20, 2, 128).max(-1)
    assert (error <= bound).all()


@pytest.mark.parametrize("columns", [512, 600, 1100])
def test_a_moment_of_many_columns_is_that_of_float64(columns: int) -> None:
    inputs = correlated(50, columns)
    values = whole_moment(inputs).values
    exact = inputs.T.astype(np.float64) @ inputs
    np.testing.assert_allclose(values, exact, atol=1e-6 * exact.diagonal().max())
    np.testing.assert_allclose(values, values.T, rtol=1e-5, atol=1e-6 * exact.diagonal().max())


@pytest.mark.parametrize("columns", [256, 384, 640])
def test_factors_are_those_of_float64_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    moment, found = whole_moment(correlated(900, columns)), []
    for threads in (1, 3):
        monkeypatch.setattr(feedback_module, "default_threads", lambda threads=threads: threads)
        found.append(SecondMoment(moment.values).feedback(128))
    assert all(np.array_equal(getattr(found[0], name), getattr(found[1], name)) for name in FEEDBACK)
    values = moment.values.astype(np.float64)
    values /= values.diagonal().mean()
    values += feedback_module.DAMPING * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(values)).T
    upper /= upper.diagonal()[:, None]
    for number, within in enumerate(found[0].within.reshape(-1, 128, 128)):
        block = slice(number * 128, (number + 1) * 128)
        np.testing.assert_allclose(within, upper[block, block], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    weights=arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    ),
    format=st.sampled_from(QUANTIZED_FORMATS),
)
def test_any_finite_weights_stay_within_their_block_s_range(weights: np.ndarray, format: Format) -> None:
    for moment in (None, SecondMoment(np.zeros((weights.shape[1], weights.shape[1]), np.float32))):
        values = stored(weights, format, moment)
        assert np.isfinite(values).all()
        assert np.abs(values).max() <= np.abs(weights.astype(np.float64)).max() * (1 + 1e-5)


def test_float_formats_are_casts() -> None:
    weights = normal(4, 30)
    np.testing.assert_array_equal(stored(weights, "fp32"), weights)
    np.testing.assert_array_equal(stored(weights, "bf16"), weights.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(stored(weights, "fp16"), weights.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("moment", [None, SecondMoment(np.eye(32, dtype=np.float32))])
def test_refuses_weights_that_are_not_finite(value: float, moment: SecondMoment | None) -> None:
    weights = normal(3, 32)
    weights[1, 5] = value
    with pytest.raises(UserError, match="not a finite number"):
        quantize(weights, "int8", moment)


def output_error(weights: np.ndarray, kept: np.ndarray, inputs: np.ndarray) -> float:
    return float(((inputs.astype(np.float64) @ (kept.astype(np.float64) - weights).T) ** 2).sum())


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_gptq_changes_outputs_less_on_inputs_it_has_not_seen(format: Format) -> None:
    weights = normal(64, 256)
    inputs = correlated(1200, 256)
    seen, unseen = inputs[:600], inputs[600:]
    nearest = output_error(weights, stored(weights, format), unseen)
    by_block = output_error(weights, stored(weights, format, block_moment(seen, 128)), unseen)
    whole = output_error(weights, stored(weights, format, whole_moment(seen)), unseen)
    assert whole < by_block < 0.7 * nearest


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_blocks_of_32_err_less_also_within_a_moment_of_128(format: Format) -> None:
    weights = normal(64, 256)
    inputs = correlated(1200, 256)
    seen, unseen = inputs[:600], inputs[600:]
    wide, narrow = block_moment(seen, 128), block_moment(seen, 32)
    error = {
        (block, name): output_error(weights, stored(weights, format, moment, block), unseen)
        for name, moment in (("none", None), ("narrow", narrow), ("wide", wide), ("whole", whole_moment(seen)))
        for block in BLOCKS
        if name != "narrow" or block <= 32
    }
    for name in ("none", "wide", "whole"):
        assert error[32, name] < 0.8 * error[128, name]
    assert error[32, "whole"] < error[32, "wide"] < error[32, "narrow"] < error[32, "none"]
    assert matrix_bytes("int8", 1, 256, 32) == 256 + 8 * 4


def test_a_moment_by_blocks_is_a_whole_one_that_knows_nothing_between_them() -> None:
    """So within a block of the moment, including scales of 32 weights, GPTQ does the same as with the whole moment."""
    weights, moment = normal(16, 256), block_moment(correlated(300, 256), 128)
    whole = np.zeros((256, 256), np.float32)
    whole[:128, :128], whole[128:, 128:] = moment.values
    for block in BLOCKS:
        np.testing.assert_array_equal(stored(weights, "int4", moment, block), stored(weights, "int4", SecondMoment(whole), block))


def test_gptq_with_inputs_that_do_not_correlate_is_rounding_with_the_best_scale() -> None:
    weights = normal(8, 64)
    kept = stored(weights, "int4", SecondMoment(np.eye(64, dtype=np.float32)))
    assert ((kept - weights) ** 2).sum() <= ((stored(weights, "int4") - weights) ** 2).sum()
    q = quantize(weights, "int4", SecondMoment(np.eye(64, dtype=np.float32)))
    np.testing.assert_array_equal(kept, np.clip(np.rint(weights / q.scales), -8, 7) * q.scales)


def test_moments() -> None:
    inputs = correlated(30, 40).astype(np.float32)
    expected = inputs.T.astype(np.float64) @ inputs
    np.testing.assert_allclose(whole_moment(inputs).values, expected, rtol=1e-4, atol=1e-4)
    blocks = block_moment(inputs, 16).values
    assert blocks.shape == (3, 16, 16)
    np.testing.assert_allclose(blocks[1], expected[16:32, 16:32], rtol=1e-4, atol=1e-4)
    assert not blocks[2, 8:].any()
    assert not whole_moment(np.zeros((0, 5), np.float32)).values.any()


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
@pytest.mark.parametrize(("rows", "columns", "block"), [(1, 16, 16), (470, 96, 32), (530, 384, 128)])
def test_gptq_is_the_paper_s_algorithm(rows: int, columns: int, block: int, format: Format) -> None:
    """In float64: as good, and but for ties every weight of the first block is the same. Between blocks, what was rounded away is
    handed on with few bits, so that many later weights are rounded the other way. Errors of rows then differ at random."""
    weights, inputs = normal(rows, columns), correlated(700, columns)
    moment = whole_moment(inputs)
    expected = gptq_in_float64(weights, format, moment.values.astype(np.float64), block)
    found = stored(weights, format, moment, 128 if block == 128 else 32)
    np.testing.assert_allclose(output_error(weights, found, inputs), output_error(weights, expected, inputs), rtol=0.04)
    alike = np.isclose(found, expected, rtol=1e-4, atol=1e-6)
    assert alike[:, :block].all(1).mean() > 0.9
    assert alike.mean() > 0.5


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_gptq_gives_the_same_bytes_on_any_number_of_threads_and_beside_any_other_rows(format: Format) -> None:
    weights, moment = normal(200, 256), whole_moment(correlated(300, 256))
    whole = quantize(weights, format, moment)
    for threads in (2, 3, 7):
        again = quantize(weights, format, SecondMoment(moment.values), threads=threads)
        assert (again.packed.tobytes(), again.scales.tobytes()) == (whole.packed.tobytes(), whole.scales.tobytes())
    some = quantize(weights[37:110], format, moment)
    np.testing.assert_array_equal(some.packed, whole.packed[37:110])
    np.testing.assert_array_equal(some.scales, whole.scales[37:110])


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_the_factors_of_a_moment_do_not_depend_on_torch_s_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    """A moment of 500 columns, which LAPACK rounds differently on two threads."""
    moment = whole_moment(correlated(400, 500))
    np.save(tmp_path / "moment.npy", moment.values)
    code = (
        "import sys, hashlib, numpy as np; from rq_compile.quantization.second_moment import SecondMoment;"
        "print(hashlib.sha256(SecondMoment(np.load(sys.argv[1])).feedback(16).within.tobytes()).hexdigest())"
    )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, threads)
    output, error = python("-c", code, str(tmp_path / "moment.npy")).communicate()
    assert output.strip() == hashlib.sha256(moment.feedback(16).within.tobytes()).hexdigest(), error


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx512", "avx2", "plain"])
def test_every_instruction_set_rounds_alike(isa: str) -> None:
    """But for rows from the first weight near a tie on. What this processor does not have falls back to ``plain``."""
    weights, inputs = normal(130, 160), correlated(300, 160)
    expected = stored(weights, "int4", whole_moment(inputs))
    with kernels_of(isa):
        found = stored(weights, "int4", whole_moment(inputs))
    assert np.isclose(found, expected, rtol=1e-4, atol=1e-6).mean() > 0.7
    np.testing.assert_allclose(output_error(weights, found, inputs), output_error(weights, expected, inputs), rtol=0.02)


@pytest.mark.parametrize("there", ["nothing", "another library"])
def test_a_package_that_was_not_built_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: str) -> None:
    if there == "another library":  # like one built from older sources, it lacks some functions
        shutil.copy(library.LIBRARY.with_name("librq_moe.so"), tmp_path / "librq_quantizer.so")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "librq_quantizer.so")
    library.quantizer_function.cache_clear()
    codes = Codes(INT8, np.zeros((3, 4), np.uint8), 0, 3, 4)
    for run in (lambda: quantize(normal(3, 32), "int8", whole_moment(normal(9, 32))), lambda: differences(codes)):
        with pytest.raises(UserError, match=r"librq_quantizer\.so is missing, too old or not .*; run pip install \."):
            run()
    library.quantizer_function.cache_clear()


def test_mxfp4_takes_what_it_can_hold_and_nothing_else() -> None:
    random = np.random.default_rng(5)
    numbers = random.choice(np.array(PACKED_FORMATS["mxfp4"].numbers, np.int8), (3, 70))
    scales = np.exp2(random.integers(-120, 100, (3, 3))).astype(np.float32)
    held = carried(SourceNumbers(numbers, scales, 32), "mxfp4", 32)
    assert held is not None
    assert held.scales.dtype == np.uint8
    np.testing.assert_array_equal(dequantize(held, "mxfp4", 70), numbers * np.repeat(scales, 32, axis=1)[:, :70])
    # A number that e2m1 does not have, a scale that is not a power of two, blocks that need two scales.
    assert carried(SourceNumbers(np.where(numbers == 12, 11, numbers).astype(np.int8), scales, 32), "mxfp4", 32) is None
    assert carried(SourceNumbers(numbers, scales * 3, 32), "mxfp4", 32) is None
    assert carried(SourceNumbers(numbers[:, :64], scales[:, :2], 32), "mxfp4", 64) is None
    # Of zeros, any scale will do: quantizers write the exponent 0, or a scale of 0.
    numbers[:, :32] = 0
    for nothing in (0, 2.0**-127, 3):
        scales[:, 0] = nothing
        held = carried(SourceNumbers(numbers, scales, 32), "mxfp4", 32)
        assert held is not None
        assert not dequantize(held, "mxfp4", 70)[:, :32].any()


@pytest.mark.parametrize("format", ["mxfp4", "fp8"])
def test_nothing_is_rounded_to_a_format_that_is_only_carried(format: Format) -> None:
    expert = ExpertWeights(np.ones((4, 32), np.float32), np.ones((32, 2), np.float32))
    assert in_format(expert, (1.0, 1.0), format, 32)[1] == np.inf
    with pytest.raises(UserError, match="the checkpoint does not store it like that"):
        quantized(expert, "up", format, 32)


def test_fp8_takes_what_it_can_hold_and_nothing_else() -> None:
    random = np.random.default_rng(5)
    codes = random.integers(0, 127, (3, 70), np.uint8) | random.integers(0, 2, (3, 70), np.uint8) << 7
    numbers, scales = codes.view(ml_dtypes.float8_e4m3fn), random.uniform(0.1, 3, (3, 3)).astype(np.float32)
    held = carried(SourceNumbers(numbers, scales, 32), "fp8", 32)
    assert held is not None
    exact = numbers.astype(np.float32) * np.repeat(scales, 32, axis=1)[:, :70]
    np.testing.assert_array_equal(dequantize(held, "fp8", 70), exact)
    whole = random.integers(-12, 13, (3, 70)).astype(np.int8)
    assert carried(SourceNumbers(whole, scales, 32), "fp8", 32) is None
    assert carried(SourceNumbers(numbers, scales, 32), "int8", 32) is None
    assert carried(SourceNumbers(numbers[:, :64], scales[:, :2], 32), "fp8", 64) is None


@pytest.mark.parametrize("isa", ["plain", "avx2"])
@pytest.mark.parametrize("block", [16, 32, 96, 128])
def test_factors_between_blocks_are_few_bits_and_err_less_than_the_nearest_ones(block: int, isa: str) -> None:
    moment = whole_moment(correlated(900, 384))
    with kernels_of(isa):
        feedback, blocks = moment.feedback(block), 384 // block
    numbers = feedback.across.astype(np.int64)[0] - feedback_module.OFFSET
    # [block, earlier block, four columns, earlier four, earlier column, column] to [earlier columns, columns]
    numbers = numbers.transpose(1, 3, 5, 0, 2, 4).reshape(384, 384)
    units = feedback.units[0].transpose(1, 0, 2).reshape(blocks, 384).repeat(block, 0)
    later = np.arange(384) // block > np.arange(384)[:, None] // block
    assert np.abs(numbers).max() == feedback_module.GREATEST
    assert not numbers[~later].any()
    values = moment.values.astype(np.float64)
    values /= values.diagonal().mean()
    values += feedback_module.DAMPING * np.eye(384)
    upper = np.linalg.cholesky(np.linalg.inv(values)).T
    upper /= upper.diagonal()[:, None]
    upper /= feedback.balance[0][:, None]
    away = (numbers * units - upper) * later
    assert np.abs(away).max() < 0.1 * np.abs(upper * later).max()
    nearest = (np.rint(upper / np.maximum(units, 1e-30)) * units - upper) * later
    # What rounding changes of outputs, were it not compensated: the change times the moment of the columns it reaches.
    assert ((away @ values) * away).sum() < 0.5 * ((nearest @ values) * nearest).sum()


def test_the_feedback_of_parts_is_that_of_each() -> None:
    values = whole_moment(correlated(900, 96)).values
    alone, several = (feedback_module.feedback_of(moment, 32) for moment in (values, np.stack([values] * 3)))
    for name in FEEDBACK:
        parts = getattr(several, name).reshape(3, *getattr(alone, name).shape)
        np.testing.assert_array_equal(parts, np.stack([getattr(alone, name)] * 3), err_msg=name)


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_few_bits_between_blocks_do_not_change_errors_of_inputs_with_outliers(format: Format) -> None:
    """Eight blocks, a steep spectrum, and channels that are 50 times as large as the others."""
    random = np.random.default_rng(0)
    weights = random.standard_t(4, (256, 256)).astype(np.float32)
    inputs = random.standard_normal((1500, 256)) / np.sqrt(np.arange(1, 257)) @ random.standard_normal((256, 256))
    inputs[:, [3, 100, 180]] *= 50
    inputs = inputs.astype(np.float32)
    moment = whole_moment(inputs)
    found = stored(weights, format, moment, 32)
    expected = gptq_in_float64(weights, format, moment.values.astype(np.float64), 32)
    np.testing.assert_allclose(output_error(weights, found, inputs), output_error(weights, expected, inputs), rtol=0.02)


def test_weights_near_the_largest_float_stay_finite() -> None:
    weights = np.float32(1e37) * normal(5, 96).clip(-3, 3)
    kept = stored(weights, "int4", whole_moment(correlated(300, 96)), 32)
    assert np.isfinite(kept).all()
