"""LatentAttention compared with float64, and the properties that serving relies on, bit for bit."""

from dataclasses import replace
from typing import Any

import latent_attention
import ml_dtypes
import numpy as np
import pytest
from attention_checks import (
    check_in_place,
    check_refused,
    check_rows_that_read_nothing,
    check_that_only_its_row_reads,
    mask_with_holes,
    ones,
    padded_masks,
    unpadded,
)
from cache_attention import causal
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_attention import Case, attend, check, last_alone, random_case
from op_nodes import python_with
from test_op_errors import instruction_sets

from rq_compile.engine import library

# (new tokens, columns): one token, and both forms of several.
STEPS = [(1, 37), (2, 90), (5, 64), (37, 37), (70, 150)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(13)


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa: str) -> None:
    result = python_with(isa, "latent_attention.py")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("steps", "total"), STEPS)
@pytest.mark.parametrize(("nope", "rope", "value"), [(16, 8, 16), (5, 3, 9), (1, 1, 1), (32, 0, 16), (24, 8, 40), (128, 64, 128)])
@pytest.mark.parametrize("rank", [1, 24, 33, 128])
def test_every_size(rng: np.random.Generator, steps: int, total: int, nope: int, rope: int, value: int, rank: int) -> None:
    check(case := random_case(rng, causal(steps, total), 3, nope, rope, value, rank, sequences=2), attend(case, threads=2))


@pytest.mark.parametrize(("steps", "total"), STEPS)
@pytest.mark.parametrize("heads", [1, 2, 16, 17, 64, 70])
@pytest.mark.parametrize("sinks", [False, True])
def test_every_number_of_heads(rng: np.random.Generator, steps: int, total: int, heads: int, sinks: bool) -> None:
    check(case := random_case(rng, causal(steps, total), heads, sinks=sinks), attend(case))


@pytest.mark.parametrize(("steps", "total"), STEPS)
@pytest.mark.parametrize("format", range(len(library.FORMAT_GROUPS)))
@pytest.mark.parametrize("rank", [24, 80, 300])
def test_every_format(rng: np.random.Generator, steps: int, total: int, format: int, rank: int) -> None:
    check(case := random_case(rng, causal(steps, total), 3, 20, 8, 12, rank, format=format), attend(case))


@pytest.mark.parametrize("float_type", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("steps", "total"), STEPS)
def test_matrices_in_16_bits(rng: np.random.Generator, float_type: Any, steps: int, total: int) -> None:
    check(case := random_case(rng, causal(steps, total), float_type=float_type), attend(case))


@pytest.mark.parametrize("steps", range(1, 71, 3))
def test_every_number_of_tokens(rng: np.random.Generator, steps: int) -> None:
    check(case := random_case(rng, causal(steps, steps + steps % 3 * 130, steps % 5), sequences=2), attend(case))


@pytest.mark.parametrize("total", [1, 63, 64, 65, 255, 256, 257, 512, 1025])
@pytest.mark.parametrize("padding", [0, 1, 700])
def test_long_rows_in_chunks(rng: np.random.Generator, total: int, padding: int) -> None:
    mask = np.concatenate([causal(1, total + padding, padding), causal(1, total + padding), causal(1, total + padding, 0, 600)])
    check(case := random_case(rng, mask, sinks=True), attend(case, threads=2))


@pytest.mark.parametrize(("steps", "past"), [(1, 150), (2, 700), (40, 20), (600, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_masks_with_holes_and_rows_that_read_nothing(rng: np.random.Generator, steps: int, past: int, sinks: bool) -> None:
    """As the indexers of DeepSeek-V3.2 write them."""
    mask = mask_with_holes(rng, steps, past, hidden=slice(2, past // 2))
    check_rows_that_read_nothing(latent_attention, random_case(rng, mask, 2, sinks=sinks))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize(("steps", "total"), STEPS)
def test_numbers_that_other_rows_read_do_not_matter(rng: np.random.Generator, broken: float, steps: int, total: int) -> None:
    check_that_only_its_row_reads(latent_attention, random_case(rng, causal(steps, total), sequences=2), ("latent",), broken)


@pytest.mark.parametrize("steps", [1, 4, 66])
@pytest.mark.parametrize("room", [0, 1, 30])
@pytest.mark.parametrize("past", [0, 1, 50])
def test_a_cache_with_room(rng: np.random.Generator, steps: int, room: int, past: int) -> None:
    mask = causal(steps, steps + past, past // 3)
    check_in_place(latent_attention, random_case(rng, mask, sequences=3, length=steps + past + room))


@pytest.mark.parametrize(("batch", "steps", "total"), [(0, 1, 9), (0, 4, 9), (2, 0, 9), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("length", [0, 9])
def test_empty_inputs(rng: np.random.Generator, batch: int, steps: int, total: int, length: int) -> None:
    case = random_case(rng, causal(steps, total), length=length, sequences=1)
    names = ("query", "latent", "position", "past_latent", "past_position")
    empty: dict[str, Any] = {name: np.repeat(getattr(case, name), batch, axis=0) for name in names}
    case = replace(case, **empty)
    check(case, attend(case))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, int]:
    """A call for a padded batch, and the padding of its last sequence."""
    rng, mask, padding = draw(padded_masks())
    sizes = [draw(st.sampled_from(choices)) for choices in ([1, 3, 16], [8, 16, 21], [0, 3, 8], [8, 16, 21], [16, 24, 80])]
    format, length = draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([0, mask.shape[3], mask.shape[3] + 5]))
    return random_case(rng, mask, *sizes, length=length, sinks=draw(st.booleans()), format=format), padding


@settings(max_examples=60, deadline=None)
@given(calls())
def test_a_sequence_has_the_same_bits_alone_without_padding_and_with_more_threads(call: tuple[Case, int]) -> None:
    case, padding = call
    outputs = attend(case)
    check(case, outputs)
    np.testing.assert_array_equal(attend(case, threads=2)[0], outputs[0])
    np.testing.assert_array_equal(attend(last_alone(case, padding))[0], outputs[0][-1:])


@pytest.mark.parametrize("length", [2, 17, 65, 130])
@pytest.mark.parametrize("padding", [1, 13, 70])
@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_has_the_same_bits_when_it_is_padded(
    rng: np.random.Generator, length: int, padding: int, window: int | None
) -> None:
    """The padding is among the new tokens, as in a batch of prompts of different lengths."""
    steps = length + padding
    padded = random_case(rng, causal(steps, steps, padding, window))
    alone = unpadded(padded, padding, ("query", "latent", "position"))
    np.testing.assert_array_equal(attend(padded)[0][:, padding:], attend(alone)[0])
    check(padded, attend(padded))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "query": ({"query": (2, 3, 95)}, "query has 95 columns, not 4 heads of 16 \\+ 8"),
    "tokens": ({"latent": (2, 4, 24)}, "latent has 2 x 4 tokens, query 2 x 3"),
    "rank": ({"latent": (2, 3, 0)}, "latent has no columns"),
    "another rank": ({"latent": (2, 3, 25), "past_latent": (2, 1, 7, 25)}, "float_weights has 24 columns, x 25"),
    "a cache too short": ({"past_latent": (2, 1, 6, 24)}, "past_latent has 6 columns, but mask has 10 for 3 new tokens"),
    "a cache of heads": ({"past_latent": (2, 4, 7, 24)}, r"past_latent has the shape \[2, 4, 7, 24\], not \[2, 1, 7, 24\]"),
    "another cache": ({"past_position": (2, 1, 7, 9)}, r"past_position has the shape \[2, 1, 7, 9\], not \[2, 1, 7, 8\]"),
    "mask's heads": ({"mask": (2, 4, 3, 10)}, r"mask has the shape \[2, 4, 3, 10\]"),
    "sinks": ({"sinks": (3,)}, "sinks is not one fp32 number for each of 4 heads"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_disagree_end_with_a_sentence(rng: np.random.Generator, wrong: str) -> None:
    shapes, sentence = WRONG[wrong]
    check_refused(latent_attention, random_case(rng, causal(3, 10), sequences=2, sinks=True), ones(shapes), sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 0}, "num_heads is 0, qk_nope_head_dim 16 and v_head_dim 16; all must be positive"),
        ({"scale": float("inf")}, "attribute scale is missing or not finite"),
        ({"value": 40}, "query has 96 columns|float_weights has 8 panels a slot, not 14"),
    ],
)
def test_attributes_that_cannot_be(rng: np.random.Generator, change: dict[str, Any], sentence: str) -> None:
    check_refused(latent_attention, random_case(rng, causal(1, 10)), change, sentence)
