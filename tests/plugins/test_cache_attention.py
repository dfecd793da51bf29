"""CacheAttention compared with float64, and the properties that serving relies on, bit for bit."""

from dataclasses import replace
from typing import Any

import cache_attention
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
from cache_attention import Case, attend, attend_in_place, causal, check, random_case, session_of, without
from hypothesis import given, settings
from hypothesis import strategies as st
from op_nodes import python_with
from test_op_errors import instruction_sets

WIDTHS = [1, 3, 8, 16, 24, 31, 32, 64, 80, 96, 128, 192, 256, 300]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa: str) -> None:
    result = python_with(isa, "cache_attention.py")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("steps", [1, 5])
def test_every_width(rng: np.random.Generator, width: int, steps: int) -> None:
    for value_width in (width, 128, 5):
        check(case := random_case(rng, causal(steps, 37), 6, 2, width, value_width), attend(case))


@pytest.mark.parametrize("steps", range(1, 71))
def test_every_number_of_tokens(rng: np.random.Generator, steps: int) -> None:
    check(case := random_case(rng, causal(steps, steps + steps % 3 * 13, steps % 5), 4, 2, 16, sequences=2), attend(case))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (9, 3), (11, 1), (20, 1), (64, 1), (70, 1), (32, 4)])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_every_group(rng: np.random.Generator, heads: int, kv_heads: int, steps: int, sinks: bool) -> None:
    check(case := random_case(rng, causal(steps, 83), heads, kv_heads, 24, sinks=sinks), attend(case))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 2), (4, 4, 40), (6, 2, 128), (5, 1, 22), (64, 8, 64)])
@pytest.mark.parametrize("steps", [1, 4, 90])
@pytest.mark.parametrize("sinks", [False, True])
def test_queries_and_keys_are_rotated(
    rng: np.random.Generator, heads: int, kv_heads: int, width: int, steps: int, sinks: bool
) -> None:
    """Also in place and with more threads; those of the past are not."""
    mask = causal(steps, steps + 13, steps % 2)
    case = random_case(rng, mask, heads, kv_heads, width, 24, sequences=2, length=steps + 20, sinks=sinks, rotated=True)
    check(case, outputs := attend(case))
    check(case, attend_in_place(case, threads=2))
    np.testing.assert_array_equal(attend(case, threads=2)[0], outputs[0])
    none = random_case(rng, causal(0, 5), heads, kv_heads, width, sequences=2, steps=0, rotated=True)
    assert attend(none)[0].size == 0


@pytest.mark.parametrize("total", [1, 15, 16, 17, 511, 512, 513, 1024, 1025, 2100])
@pytest.mark.parametrize("padding", [0, 1, 700])
def test_long_rows_in_chunks(rng: np.random.Generator, total: int, padding: int) -> None:
    mask = np.concatenate([causal(1, total + padding, padding), causal(1, total + padding), causal(1, total + padding, 0, 600)])
    check(case := random_case(rng, mask, 6, 2, 16, sinks=True), attend(case, threads=2))


@pytest.mark.parametrize("steps", [1, 2, 40, 130])
@pytest.mark.parametrize("sinks", [False, True])
def test_masks_with_holes_and_rows_that_read_nothing(rng: np.random.Generator, steps: int, sinks: bool) -> None:
    mask = mask_with_holes(rng, steps, 150, hidden=slice(20, 120))
    check_rows_that_read_nothing(cache_attention, random_case(rng, mask, 4, 2, 20, sinks=sinks))


@pytest.mark.parametrize("window", [1, 5, 64, 100])
@pytest.mark.parametrize("steps", [1, 7, 150])
def test_sliding_windows(rng: np.random.Generator, window: int, steps: int) -> None:
    check(case := random_case(rng, causal(steps, steps + 90, 40, window), 4, 4, 16), attend(case))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("steps", [1, 6, 70])
def test_numbers_that_other_rows_read_do_not_matter(rng: np.random.Generator, broken: float, steps: int) -> None:
    case = random_case(rng, causal(steps, steps + 20), 4, 2, 16, sequences=2)
    check_that_only_its_row_reads(cache_attention, case, ("key", "value"), broken)


def test_a_row_of_nan_is_not_taken_for_one_that_reads_nothing(rng: np.random.Generator) -> None:
    for steps in (1, 3):
        case = random_case(rng, causal(steps, 5), 2, 2, 8)
        assert np.isnan(attend(replace(case, query=np.full_like(case.query, np.nan)))[0]).all()


@pytest.mark.parametrize("steps", [1, 4, 66])
@pytest.mark.parametrize("room", [0, 1, 30])
@pytest.mark.parametrize("past", [0, 1, 50])
def test_a_cache_with_room(rng: np.random.Generator, steps: int, room: int, past: int) -> None:
    mask = causal(steps, steps + past, past // 3)
    check_in_place(cache_attention, random_case(rng, mask, 4, 2, 16, 24, sequences=3, length=steps + past + room))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_prompt_has_no_past(rng: np.random.Generator, steps: int) -> None:
    check(case := random_case(rng, causal(steps, steps), sequences=2), attend(case))


@pytest.mark.parametrize(("batch", "steps", "total"), [(0, 1, 9), (0, 4, 9), (2, 0, 9), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("length", [0, 9])
def test_empty_inputs(rng: np.random.Generator, batch: int, steps: int, total: int, length: int) -> None:
    case = random_case(rng, causal(steps, total), length=length, sequences=1)
    empty: dict[str, Any] = {
        name: np.repeat(getattr(case, name), batch, axis=0) for name in ("query", "key", "value", "past_key", "past_value")
    }
    check(case := replace(case, **empty), attend(case))


def test_one_row_of_a_mask_for_all_tokens(rng: np.random.Generator) -> None:
    mask = rng.random((2, 1, 1, 40)) < 0.6
    check(case := random_case(rng, mask, 4, 2, 16, steps=9), attend(case))
    check(case := random_case(rng, mask[:1], 4, 2, 16, steps=9, sequences=3), attend(case))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, int]:
    """A call for a padded batch, and the padding of its last sequence."""
    rng, mask, padding = draw(padded_masks())
    heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5, 16]))
    width, value_width = draw(st.sampled_from(WIDTHS[:8])), draw(st.sampled_from(WIDTHS[:8]))
    length = draw(st.sampled_from([0, mask.shape[3], mask.shape[3] + 5]))
    return random_case(rng, mask, heads * group, heads, width, value_width, length=length, sinks=draw(st.booleans())), padding


def last_alone(case: Case) -> Case:
    names = ("query", "key", "value", "past_key", "past_value", "mask")
    return replace(case, **{name: getattr(case, name)[-1:] for name in names})


@settings(max_examples=60, deadline=None)
@given(calls())
def test_a_sequence_has_the_same_bits_alone_without_padding_and_with_more_threads(call: tuple[Case, int]) -> None:
    case, padding = call
    outputs = attend(case)
    check(case, outputs)
    np.testing.assert_array_equal(attend(case, threads=2)[0], outputs[0])
    alone = without(last_alone(case), padding)
    np.testing.assert_array_equal(attend(alone)[0], outputs[0][-1:])


@pytest.mark.parametrize("length", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("padding", [1, 13, 70])
@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_has_the_same_bits_when_it_is_padded(
    rng: np.random.Generator, length: int, padding: int, window: int | None
) -> None:
    """Also if the padding is among the new tokens, as in a batch of prompts of different lengths."""
    steps = length + padding
    padded = random_case(rng, causal(steps, steps, padding, window), 6, 2, 24)
    alone = unpadded(padded, padding, ("query", "key", "value"))
    if length > 1:  # one token is read in chunks
        np.testing.assert_array_equal(attend(padded)[0][:, padding:], attend(alone)[0])
    check(padded, attend(padded))


ROOM = "columns, but mask has 10 for 3 new tokens: it must have 7, or 10 and more"
FIT = "which does not fit 2 sequences of 3 tokens"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "key's width": ({"key": (2, 3, 30)}, "query has 16 numbers for each head, key 15"),
    "key's heads": ({"key": (2, 3, 31)}, "key has 31 columns, which do not divide into 2 heads"),
    "query's heads": ({"query": (2, 3, 65)}, "query has 65 columns, which do not divide into 4 heads"),
    "no width": ({"value": (2, 3, 0)}, "value has 0 columns, which do not divide into 2 heads"),
    "tokens": ({"value": (2, 4, 32)}, "value has 2 x 4 tokens, query 2 x 3"),
    "sequences": ({"key": (1, 3, 32)}, "key has 1 x 3 tokens, query 2 x 3"),
    "a cache too short": ({"past_key": (2, 2, 6, 16)}, f"past_key has 6 {ROOM}"),
    "room for a part": ({"past_key": (2, 2, 9, 16)}, f"past_key has 9 {ROOM}"),
    "another cache": ({"past_value": (2, 2, 10, 16)}, r"past_value has the shape \[2, 2, 10, 16\], not \[2, 2, 7, 16\]"),
    "a cache of other heads": ({"past_key": (2, 4, 7, 16)}, r"past_key has the shape \[2, 4, 7, 16\], not \[2, 2, 7, 16\]"),
    "mask's sequences": ({"mask": (3, 1, 3, 10)}, rf"mask has the shape \[3, 1, 3, 10\], {FIT}"),
    "mask's heads": ({"mask": (2, 4, 3, 10)}, rf"mask has the shape \[2, 4, 3, 10\], {FIT}"),
    "mask's tokens": ({"mask": (2, 1, 2, 10)}, rf"mask has the shape \[2, 1, 2, 10\], {FIT}"),
    "few columns": ({"mask": (2, 1, 3, 2)}, "mask has 2 columns, fewer than the 3 new tokens"),
    "sinks": ({"sinks": (3,)}, "sinks is not one fp32 number for each of 4 heads"),
    "angles of other tokens": ({"cos": (3, 8)}, r"cos is not fp32 \[6, 16 / 2\], for each token and half of a head"),
    "angles of other heads": ({"sin": (6, 16)}, r"sin is not fp32 \[6, 16 / 2\], for each token and half of a head"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_disagree_end_with_a_sentence(rng: np.random.Generator, wrong: str) -> None:
    shapes, sentence = WRONG[wrong]
    case = random_case(rng, causal(3, 10), 4, 2, 16, sequences=2, sinks=True, rotated=True)
    check_refused(cache_attention, case, ones(shapes), sentence)


def test_angles_without_their_sines_are_refused(rng: np.random.Generator) -> None:
    case = random_case(rng, causal(3, 10), 4, 2, 16, rotated=True)
    check_refused(cache_attention, case, {"sin": None}, "input sin is missing")
    check_refused(cache_attention, random_case(rng, causal(3, 10), 4, 2, 15, rotated=True), {}, "cos is not fp32")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv_heads": 3}, "num_heads is 4, not a multiple of kv_num_heads, 3"),
        ({"kv_heads": 0}, "num_heads is 4, not a multiple of kv_num_heads, 0"),
        ({"heads": -2}, "num_heads is -2, not a multiple of kv_num_heads, 2"),
        ({"scale": float("inf")}, "attribute scale is missing or not finite"),
    ],
)
def test_attributes_that_cannot_be(rng: np.random.Generator, change: dict[str, Any], sentence: str) -> None:
    check_refused(cache_attention, random_case(rng, causal(1, 10), 4, 2, 16), change, sentence)


def test_a_buffer_of_both_without_room_is_refused(rng: np.random.Generator) -> None:
    """A present with more columns than its past lies otherwise in memory."""
    case = random_case(rng, causal(1, 10), 4, 2, 16)
    running = session_of(case)
    binding = running.io_binding()
    buffers = {name: np.zeros(2 * 10 * 16, np.float32) for name in ("key", "value")}
    for name, array in case.feeds().items():
        if name.startswith("past_"):
            address = buffers[name.removeprefix("past_")].ctypes.data
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, address)
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    for name, buffer in buffers.items():
        binding.bind_output(f"present_{name}", "cpu", 0, np.float32, (1, 2, 10, 16), buffer.ctypes.data)
    with pytest.raises(
        Exception, match="present_key overlaps past_key; bind the same buffer, with room for 10 columns, or another"
    ):
        running.run_with_iobinding(binding)
