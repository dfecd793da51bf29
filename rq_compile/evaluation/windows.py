"""Cuts text into windows without padding, so that padding cannot affect perplexities or loads."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from rq_compile.checkpoint.tokenizer import check_known, encode
from rq_compile.errors import UserError

MAX_BATCH = 8
# Logits of one batch stay under 256 MiB in fp32, whatever the vocabulary.
MAX_LOGITS = 2**26


@dataclass(frozen=True)
class Windows:
    """Token windows of one text: int64 ``[count, length]``. Tokens after the last complete window are dropped."""

    name: str
    ids: np.ndarray

    def batches(self, vocabulary: int) -> Iterator[np.ndarray]:
        size = max(1, min(MAX_BATCH, MAX_LOGITS // (self.ids.shape[1] * vocabulary)))
        for start in range(0, len(self.ids), size):
            yield self.ids[start : start + size]


def cut(name: str, text: str, tokenizer: Tokenizer, length: int, vocabulary: int | None = None) -> Windows:
    """Windows of ``length`` tokens. A shorter text is one window of its own length. ``vocabulary``: size of the model's
    vocabulary.

    Raises:
        UserError: the text is empty, has a single token, or has a token outside the vocabulary.
    """
    ids = encode(tokenizer, text)
    if len(ids) < 2:
        raise UserError(f"{name} has {len(ids)} tokens, but an evaluation needs at least 2; give another --text", 2)
    if vocabulary is not None:
        check_known(name, ids, vocabulary)
    length = min(length, len(ids))
    return Windows(name, ids[: len(ids) // length * length].reshape(-1, length))
