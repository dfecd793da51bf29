"""What rounding the head changes of the probabilities of the next token."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch

from rq_compile.processes import world
from rq_compile.quantization.formats import DENSE_QUANTIZED, Format
from rq_compile.quantization.quantizer import torch_tensor

# Rows of the head that run at a time.
ROWS = 1 << 13


def head_divergence(
    config: Any, weights: np.ndarray, hidden: torch.Tensor, rounded: Callable[[np.ndarray, Format], np.ndarray]
) -> tuple[dict[Format, float], int]:
    """KL divergence in nats of the probabilities with the ``rounded`` head, by format, summed over tokens; and their number.

    ``weights [vocabulary, hidden]``; ``hidden [n, hidden]`` fp32: those of this process. The processes share the vocabulary.
    """
    size = world().size
    hidden = torch.cat(list(world().all(range(size), [hidden])))

    def logits(some: np.ndarray) -> torch.Tensor:
        return _final(hidden @ torch.from_numpy(some).mT, config).double()

    def part(start: int) -> _Logits:
        some = torch_tensor(weights[start : start + rows]).float().numpy()
        return _Logits.of(logits(some), (logits(rounded(some, format)) for format in DENSE_QUANTIZED))

    rows = min(ROWS, -(-len(weights) // size))
    starts = range(0, len(weights), rows)
    owners = world().owners([1] * len(starts))
    own = list(map(part, world().own(owners, starts)))  # all of them before any is sent
    errors = reduce(add, world().all(owners, own)).divergence().sum(1).tolist()
    return {format: max(0.0, error) for format, error in zip(DENSE_QUANTIZED, errors, strict=True)}, len(hidden)


@dataclass(frozen=True)
class _Logits:
    """What is needed of the logits of some entries of the vocabulary, all float64.

    ``before [tokens]`` and ``after [formats, tokens]``: logarithms of the sums of their exponentials.
    ``difference [formats, tokens]``: the mean difference of the logits before to those after, weighted with the probabilities
    before, as if there were no other entries.
    """

    before: torch.Tensor
    after: torch.Tensor
    difference: torch.Tensor

    @classmethod
    def of(cls, before: torch.Tensor, after: Iterable[torch.Tensor]) -> "_Logits":
        """Of logits ``[tokens, entries]``."""
        log_sum = before.logsumexp(1)
        probabilities = (before - log_sum[:, None]).exp()
        pairs = [(other.logsumexp(1), (probabilities * (before - other)).sum(1)) for other in after]
        return cls(log_sum, *map(torch.stack, zip(*pairs, strict=True)))

    def __add__(self, others: "_Logits") -> "_Logits":
        """Of the entries of both."""
        before = torch.logaddexp(self.before, others.before)
        shares = [(part.before - before).exp() for part in (self, others)]
        difference = self.difference * shares[0] + others.difference * shares[1]
        return _Logits(before, torch.logaddexp(self.after, others.after), difference)

    def divergence(self) -> torch.Tensor:
        """``[formats, tokens]``, in nats."""
        return self.difference + self.after - self.before


def _final(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """The model's logits: some families scale or bound what the head computes."""
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if bound := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / bound) * bound
    return logits
