"""One step of an engine for several sequences, with a cache in arrays that the caller provides."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .decoding import Step

if TYPE_CHECKING:
    import onnxruntime


class Steps(Protocol):
    """What a scheduler needs of a model.

    ``cache``: the tensors of the cache, as in an engine's manifest. ``shares_steps``: whether the logits of a sequence are the
    same alone and in a step with others. ``whole_prompts``: whether a prompt must run in one step. ``reuses_prefixes``: whether
    the cache of some tokens is the same whatever follows them.
    """

    cache: Sequence[Mapping[str, Any]]
    vocabulary: int
    end_of_text: Collection[int]
    recomputed_beyond: int | None
    shares_steps: bool
    whole_prompts: bool
    reuses_prefixes: bool

    def step(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Sequence[np.ndarray], present: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Logits fp32 ``[batch, vocabulary]`` of each row's last token, valid until the next step. Fills ``present``, the cache
        after the step.

        ``ids`` and ``positions`` int64 ``[batch, new]``; ``mask`` int64 ``[batch, past + new]``, 0 for padding; ``past`` and
        ``present`` fp32, one for each tensor of ``cache``. ``present`` must be contiguous. A tensor that grows in place may be
        the same array in both, with room for at least ``past + new`` tokens.
        """
        ...


class EngineSteps:
    """The steps of an engine in ONNX Runtime."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Mapping[str, Any]) -> None:
        """``manifest``: the engine's manifest as parsed JSON."""
        self.cache = manifest["cache"]
        self.step = Step(session, self.cache)
        self.vocabulary = manifest["vocabulary"]
        self.end_of_text: Collection[int] = frozenset(manifest["end_of_text"])
        self.recomputed_beyond = manifest.get("recomputed_beyond")
        # Rotary embeddings that depend on the length would take that of the longest sequence in the step.
        self.whole_prompts = manifest.get("prefill_chunk") is None
        alone = self.whole_prompts or mixed_copies(manifest) or manifest.get("padding_changes_logits", False)
        self.shares_steps = not alone
        self.reuses_prefixes = reuses_prefixes(manifest)


def mixed_copies(manifest: Mapping[str, Any]) -> bool:
    """Whether copies of an expert differ in format, so that an answer depends on its batch."""
    for layer in manifest["plan"]["layers"]:
        formats: dict[int, str] = {}
        if any(formats.setdefault(slot["expert"], slot["format"]) != slot["format"] for slot in layer["slots"]):
            return True
    return False


def reuses_prefixes(manifest: Mapping[str, Any]) -> bool:
    """Whether an engine's cache of some tokens is the same whatever follows them, and in whichever steps they are read. It is not
    where rotary embeddings depend on the length, or copies of an expert differ in format."""
    by_length = manifest.get("prefill_chunk") is None or manifest.get("recomputed_beyond") is not None
    return not by_length and not mixed_copies(manifest)
