"""The interface of a model for evaluation and benchmarks, whether an engine or the transformers reference runs it."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np


class LanguageModel(Protocol):
    @property
    def encoder_decoder(self) -> bool: ...

    @property
    def decoder_start(self) -> int | None: ...

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, decoder_input_ids: np.ndarray | None = None
    ) -> np.ndarray:
        """Next-token logits fp32 ``[batch, sequence, vocabulary]`` of int64 ids ``[batch, sequence]``."""
        ...

    def generate(self, prompt_ids: Sequence[int], max_tokens: int, *, stop: bool = True) -> Iterator[int]:
        """Greedy tokens one by one. With ``stop``, they end before the end-of-text token."""
        ...


def is_recomputed(beyond: int | None, cached: int, length: int) -> bool:
    """Whether a sequence that grows to ``length`` tokens, of which ``cached`` are computed, must be computed again. This is the
    case where it first exceeds ``beyond``, as in transformers' ``generate`` (see ``architectures.rope``)."""
    return beyond is not None and cached <= beyond < length
