"""One step of an engine for several sequences, with a cache in arrays that the caller provides."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

# Value of the input ``logits_to_keep``: only the logits of each row's last token.
LAST = 1


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
        """Logits fp32 ``[batch, vocabulary]`` of each row's last token. Fills ``present``, the cache after the step.

        ``ids`` and ``positions`` int64 ``[batch, new]``; ``mask`` int64 ``[batch, past + new]``, 0 for padding; ``past`` and
        ``present`` fp32, one for each tensor of ``cache``. ``present`` must be contiguous.
        """
        ...


class EngineSteps:
    """The steps of an engine in ONNX Runtime."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Mapping[str, Any]) -> None:
        """``manifest``: the engine's manifest as parsed JSON."""
        self._session = session
        self._inputs = {tensor.name for tensor in (*session.get_inputs(), *session.get_overridable_initializers())}
        self.cache = manifest["cache"]
        self.vocabulary = manifest["vocabulary"]
        self.end_of_text: Collection[int] = frozenset(manifest["end_of_text"])
        self.recomputed_beyond = manifest.get("recomputed_beyond")
        # Rotary embeddings that depend on the length would take that of the longest sequence in the step.
        self.whole_prompts = manifest.get("prefill_chunk") is None
        alone = self.whole_prompts or mixed_copies(manifest) or manifest.get("padding_changes_logits", False)
        self.shares_steps = not alone
        self.reuses_prefixes = reuses_prefixes(manifest)

    def step(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Sequence[np.ndarray], present: Sequence[np.ndarray]
    ) -> np.ndarray:
        kept = np.array([LAST], np.int64)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": kept}
        given |= {tensor["past"]: array for tensor, array in zip(self.cache, past, strict=True)}
        given = {name: np.ascontiguousarray(array) for name, array in given.items()}  # arrays are bound by their addresses
        if not all(array.flags.c_contiguous for array in present):
            raise ValueError("an array for the cache after the step is not contiguous")
        binding = self._session.io_binding()
        for name, array in given.items():
            if name in self._inputs:
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu")
        for tensor, array in zip(self.cache, present, strict=True):
            binding.bind_output(tensor["present"], "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[:, -1]


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
