"""Products with rounded weights as integers, against float64."""

import numpy as np
import pytest
from instruction_sets import kernels_of

from rq_compile.quantization.gptq import Rounded

# rows, blocks, block, columns, inputs
SHAPES = [
    (1, 1, 16, 16, 1),
    (3, 2, 64, 128, 64),
    (64, 1, 128, 128, 0),
    (65, 2, 128, 250, 129),
    (70, 3, 16, 40, 5),
    (130, 4, 32, 100, 67),
]


def rounded(rows: int, blocks: int, block: int, columns: int) -> Rounded:
    """With the largest numbers that a sum must hold, and a row of zeros."""
    random = np.random.default_rng(rows)
    q = random.integers(-128, 128, (rows, blocks, block)).astype(np.int8)
    q[0], q[-1] = -128, 0
    return Rounded(q, random.uniform(-1, 1, (rows, blocks)).astype(np.float32), columns)


def inputs_of(columns: int, tokens: int) -> np.ndarray:
    """Tokens of very different sizes, one of zeros, and one of equal inputs."""
    inputs = np.random.default_rng(columns).standard_normal((columns, tokens)).astype(np.float32)
    inputs *= np.float32(10.0) ** (np.arange(tokens) % 9 - 4)
    inputs[:, 1::7], inputs[:, 2::7] = 0, 3
    return inputs


def assert_close(found: np.ndarray, matrix: Rounded, inputs: np.ndarray) -> None:
    """Each input may err by half a unit: 1 / 65,534 of the largest of its block, here of the token."""
    weights = matrix.values().astype(np.float64)
    assert found.shape == (len(weights), inputs.shape[1])
    unit = np.abs(inputs).max(axis=0, initial=0) / 32767
    bound = np.abs(weights).sum(1)[:, None] * unit / 2 + 1e-5 * (np.abs(weights) @ np.abs(inputs))
    assert (np.abs(found - weights @ inputs.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(shape: tuple[int, int, int, int, int]) -> None:
    *of_matrix, tokens = shape
    matrix, inputs = rounded(*of_matrix), inputs_of(shape[3], tokens)
    assert_close(matrix.times(inputs), matrix, inputs)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_products_do_not_depend_on_threads_or_other_inputs(threads: int) -> None:
    matrix, inputs = rounded(200, 2, 64, 128), inputs_of(128, 150)
    whole = matrix.times(inputs)
    np.testing.assert_array_equal(matrix.times(inputs, threads), whole)
    np.testing.assert_array_equal(matrix.times(inputs[:, 37:101], threads), whole[:, 37:101])


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx512", "avx2", "plain"])
def test_every_instruction_set_multiplies_alike(isa: str) -> None:
    """What this processor does not have falls back to ``plain``."""
    matrix, inputs = rounded(70, 3, 16, 40), inputs_of(40, 67)
    with kernels_of(isa):
        assert_close(matrix.times(inputs), matrix, inputs)
