"""What evaluation and benchmarks ask of a model, whether an engine or the transformers reference runs it."""

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
        """Greedy tokens one by one; ``stop`` ends at the end-of-text token, which is not yielded."""
        ...


def is_recomputed(beyond: int | None, cached: int, length: int) -> bool:
    """Whether a sequence that grows to ``length`` tokens, of which ``cached`` are computed, is computed anew: where it first
    exceeds ``beyond``, as transformers' ``generate`` does (see ``architectures.rope``)."""
    return beyond is not None and cached <= beyond < length
