"""Sums over weights, compared with numpy in float64."""

import numpy as np
import pytest

from rq_compile.quantization.formats import QUANTIZED_FORMATS, Format
from rq_compile.quantization.quantizer import rounded_by_moment, stored
from rq_compile.quantization.second_moment import block_moment, whole_moment
from rq_compile.quantization.weight_sums import lowest_scores, squared_difference, squared_half_error

pytestmark = pytest.mark.quick

SHAPES = [(1, 1), (3, 15), (2, 16), (70, 33), (5, 513), (130, 768)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("threads", [1, 3])
def test_squared_differences(shape: tuple[int, int], magnitude: float, threads: int) -> None:
    some, others = (normal(*shape, seed=seed) * np.float32(magnitude) for seed in (0, 1))
    expected = ((some - others).astype(np.float64) ** 2).sum()
    np.testing.assert_allclose(squared_difference(some, others, threads), expected, rtol=1e-12)
    np.testing.assert_allclose(squared_difference(some, threads=threads), (some.astype(np.float64) ** 2).sum(), rtol=1e-12)
    assert squared_difference(some, others, threads) == squared_difference(some, others, 7)
    assert squared_difference(some, some.copy()) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_squared_errors_of_fp16(shape: tuple[int, int], threads: int) -> None:
    for magnitude in (1.0, 1e-3, 2e-5, 1e-7, 1e-9, 1e3):
        weights = normal(*shape) * np.float32(magnitude)
        expected = ((weights.astype(np.float16).astype(np.float32) - weights).astype(np.float64) ** 2).sum()
        np.testing.assert_allclose(squared_half_error(weights, threads), expected, rtol=1e-12)


def test_every_float_is_rounded_to_fp16_as_numpy_does() -> None:
    """All neighbours and midpoints of the numbers of fp16, and the ends of its range."""
    numbers = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    middles = (numbers[:-1] + numbers[1:]) / 2
    some = np.concatenate([numbers, middles, np.nextafter(middles, 0), np.nextafter(middles, np.float32(np.inf)), [65519.996]])
    for weights in np.array_split(np.sort(some).astype(np.float32), 2000):  # of similar magnitude: one that is off would show
        expected = ((weights.astype(np.float16).astype(np.float32) - weights).astype(np.float64) ** 2).sum()
        for sign in (1, -1):
            np.testing.assert_allclose(squared_half_error(sign * weights[None]), expected, rtol=1e-12)
    assert squared_half_error(np.full((1, 3), 65520, np.float32)) == np.inf


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    weights = normal(3, 40)
    weights[1, 37] = value
    assert not np.isfinite(squared_difference(weights, normal(3, 40)))
    assert not np.isfinite(squared_half_error(weights))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 0.0), (0.3, 0.9), (0.5, 0.5), (np.inf, np.inf)])
def test_lowest_scores(shape: tuple[int, int], low: float, high: float) -> None:
    weights, norms = normal(*shape), np.abs(normal(shape[1], seed=1))
    weights[:, ::3] = 0.0
    weights[:, 1::3] *= -1
    scores = np.abs(weights * norms)
    below, total, between = lowest_scores(-weights, norms, low, high)
    assert below == (scores < np.float32(low)).sum()
    np.testing.assert_allclose(total, scores[scores < np.float32(low)].sum(dtype=np.float64), rtol=1e-5)
    near = scores[(scores >= np.float32(low)) & (scores <= np.float32(high))]
    np.testing.assert_array_equal(np.sort(between), np.sort(near))


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 40), (70, 96), (64, 384), (65, 129)])
def test_the_change_that_gptq_tells_is_that_of_its_values(shape: tuple[int, int], format: Format) -> None:
    weights, inputs = normal(*shape), normal(50, shape[1], seed=1)
    for moment in (whole_moment(inputs), block_moment(inputs, 16)):
        for threads in (1, 3):
            rounded, change = rounded_by_moment(weights, format, moment, 16, threads=threads)
            values = rounded.values()
            np.testing.assert_array_equal(values, stored(weights, format, moment, 16))
            np.testing.assert_allclose(change, ((values - weights).astype(np.float64) ** 2).sum(), rtol=1e-9)
