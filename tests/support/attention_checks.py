"""What holds for both attention ops. ``op`` is the module ``cache_attention`` or ``latent_attention``, whose cases these are."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cache_attention import causal
from hypothesis import strategies as st


def mask_with_holes(rng: np.random.Generator, steps: int, past: int, hidden: slice) -> np.ndarray:
    """[3, 1, steps, past + steps]: sequences that read most, some and few columns. Every seventh row reads nothing, and no row of
    the last sequence reads the columns ``hidden``."""
    mask = rng.random((3, 1, steps, past + steps)) < np.array([0.9, 0.3, 0.02])[:, None, None, None]
    mask[:, :, ::7] = False
    mask[2, :, :, hidden] = False
    return mask


@st.composite
def padded_masks(draw: st.DrawFn) -> tuple[np.random.Generator, np.ndarray, int]:
    """The mask of a padded batch whose last sequence reads nothing before the padding, which may hide it all; and the padding."""
    steps, past = draw(st.sampled_from([1, 1, 2, 9, 33, 65])), draw(st.integers(0, 90)) + draw(st.sampled_from([0, 500, 1100]))
    total, padding = past + steps, draw(st.integers(0, past))
    window = draw(st.sampled_from([None, 3, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    others = [causal(steps, total, draw(st.integers(0, total)), window) for _ in range(draw(st.integers(0, 2)))]
    mask = np.concatenate([*others, causal(steps, total, padding, window)])
    if draw(st.booleans()):
        mask[-1, :, :, padding:] &= rng.random(total - padding) < 0.8
    return rng, mask, padding


def check_rows_that_read_nothing(op: ModuleType, case: Any) -> None:
    """Every seventh row of the case is such a row."""
    outputs = op.attend(case)
    op.check(case, outputs)
    assert not outputs[0][:, ::7].any()


def check_that_only_its_row_reads(op: ModuleType, case: Any, names: Sequence[str], broken: float) -> None:
    """A last token with ``broken`` numbers in these inputs makes its own row NaN, but no earlier row and no other sequence."""
    fine = op.attend(case)[0]
    changed = {name: getattr(case, name).copy() for name in names}
    for array in changed.values():
        array[0, -1] = broken
    y = op.attend(replace(case, **changed))[0]
    assert not np.isfinite(y[0, -1]).any()
    np.testing.assert_array_equal(y[0, :-1], fine[0, :-1])
    np.testing.assert_array_equal(y[1], fine[1])


def check_in_place(op: ModuleType, case: Any) -> None:
    """The outputs have the bits of a call with copies, also with two threads. What is beyond the mask stays in the caches."""
    copied, in_place, two_threads = op.attend(case), op.attend_in_place(case), op.attend_in_place(case, threads=2)
    op.check(case, copied)
    op.check(case, in_place)
    for a, b, c in zip(copied, in_place, two_threads, strict=True):
        read = slice(None) if a.ndim == 3 else (slice(None), slice(None), slice(0, case.total))
        np.testing.assert_array_equal(a[read], b[read])
        np.testing.assert_array_equal(a[read], c[read])
    pasts = [array for name, array in case.feeds().items() if name.startswith("past_")]
    for present, past in zip(in_place[1:], pasts, strict=True):
        np.testing.assert_array_equal(present[:, :, case.total :], past[:, :, case.total :])


def unpadded(case: Any, padding: int, names: Sequence[str]) -> Any:
    """The same prompt without its first tokens, which are padding; ``names``: the inputs of new tokens."""
    fresh = {name: getattr(case, name)[:, padding:] for name in names}
    return replace(case, mask=case.mask[:, :, padding:, padding:], **fresh)


def check_refused(op: ModuleType, case: Any, changes: dict[str, Any], sentence: str) -> None:
    """The case with these attributes ends with the sentence, a regular expression, after the name of the op."""
    name = {"cache_attention": "CacheAttention", "latent_attention": "LatentAttention"}[op.__name__]
    with pytest.raises(Exception, match=f"rq.moe {name}: {sentence}"):
        op.attend(replace(case, **changes))


def ones(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Inputs of these shapes."""
    return {name: np.ones(shape, np.bool_ if name == "mask" else np.float32) for name, shape in shapes.items()}
