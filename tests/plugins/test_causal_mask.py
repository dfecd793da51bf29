"""CausalMask compared with a loop over its definition."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from op_nodes import run_op


def causal_mask(attention_mask: np.ndarray, steps: int, threads: int = 1, **attributes: Any) -> np.ndarray:
    tokens = np.zeros((len(attention_mask), steps), np.int64)
    inputs = {"attention_mask": attention_mask.astype(np.int64), "input_ids": tokens}
    return run_op("CausalMask", inputs, {"mask": TensorProto.BOOL}, threads, **attributes)[0]


def by_definition(attention_mask: np.ndarray, steps: int, window: int | None) -> np.ndarray:
    batch, total = attention_mask.shape
    mask = np.zeros((batch, 1, steps, total), bool)
    for b in range(batch):
        for s in range(steps):
            own = total - steps + s
            first = 0 if window is None else own - window + 1
            for column in range(max(first, 0), own + 1):
                mask[b, 0, s, column] = attention_mask[b, column] != 0
    return mask


@given(
    batch=st.integers(0, 3),
    steps=st.integers(0, 9),
    past=st.integers(0, 20),
    window=st.none() | st.integers(1, 30),
    threads=st.integers(1, 2),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=200, deadline=None)
def test_it_is_its_definition(batch: int, steps: int, past: int, window: int | None, threads: int, seed: int) -> None:
    """Padding before, after and between tokens, also of whole sequences; numbers other than 0 are read."""
    rng = np.random.default_rng(seed)
    read = rng.integers(-1, 3, (batch, past + steps)) * (rng.random((batch, 1)) < 0.8)
    attributes = {} if window is None else {"local_window_size": window}
    found = causal_mask(read, steps, threads, **attributes)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, by_definition(read, steps, window))


@pytest.mark.parametrize("window", [-1, 1, 5000, 1 << 40])
@pytest.mark.parametrize(("steps", "past"), [(1, 70_000), (17, 9_001)])
def test_rows_of_several_tiles(steps: int, past: int, window: int) -> None:
    read = np.random.default_rng(3).integers(0, 2, (3, past + steps))
    limit = None if window == -1 else min(window, past + steps)
    expected = by_definition(read, steps, limit)
    np.testing.assert_array_equal(causal_mask(read, steps, 2, local_window_size=window), expected)


@pytest.mark.parametrize("window", [0, -2])
def test_a_window_that_cannot_be(window: int) -> None:
    with pytest.raises(Exception, match=f"local_window_size is {window}, neither positive nor -1"):
        causal_mask(np.ones((1, 3)), 1, local_window_size=window)


def test_inputs_that_disagree() -> None:
    kinds = {"mask": TensorProto.BOOL}
    for mask, tokens, sentence in (
        ((2, 3), (1, 3), "attention_mask has 2 sequences, input_ids 1"),
        ((1, 3), (1, 4), "attention_mask has 3 columns, fewer than the 4 tokens of input_ids"),
    ):
        inputs = {"attention_mask": np.ones(mask, np.int64), "input_ids": np.zeros(tokens, np.int64)}
        with pytest.raises(Exception, match=f"rq.moe CausalMask: {sentence}"):
            run_op("CausalMask", inputs, kinds)
