"""What rounding the head changes of the probabilities of the next token."""

from collections.abc import Callable
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

    ``weights [vocabulary, hidden]``; ``hidden [n, hidden]`` fp32: those of this process. The processes share the rounding.
    """
    before = _Sum(len(hidden))
    after = {format: _Sum(len(hidden)) for format in DENSE_QUANTIZED}
    for start in range(0, len(weights), ROWS):
        some = torch_tensor(weights[start : start + ROWS]).float().numpy()
        logits = _final(hidden @ torch.from_numpy(some).mT, config)
        before.add(logits)
        owners = world().owners([1] * len(after))
        own = [rounded(some, format) for format in world().own(owners, after)]
        for sums, values in zip(after.values(), world().all(owners, own), strict=True):
            sums.add(_final(hidden @ torch.from_numpy(values).mT, config), logits)
    found = [float((sums.mean_difference + sums.log_sum - before.log_sum).sum()) for sums in after.values()]
    *errors, rows = world().sum(np.array([*found, len(hidden)])).tolist()
    return {format: max(0.0, error) for format, error in zip(after, errors, strict=True)}, int(rows)


class _Sum:
    """For each token, the logarithm of the sum of exponentials of logits that come in parts; and the mean difference of other
    logits to these, weighted with the others' probabilities."""

    def __init__(self, tokens: int) -> None:
        self.log_sum = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        self._others = self.log_sum.clone()
        self._difference = torch.zeros(tokens, dtype=torch.float64)

    def add(self, logits: torch.Tensor, others: torch.Tensor | None = None) -> None:
        self.log_sum = torch.logaddexp(self.log_sum, logits.double().logsumexp(1))
        if others is not None:
            wide = others.double()
            total = torch.logaddexp(self._others, wide.logsumexp(1))
            part = ((wide - total[:, None]).exp() * (wide - logits.double())).sum(1)
            self._difference = self._difference * (self._others - total).exp() + part
            self._others = total

    @property
    def mean_difference(self) -> torch.Tensor:
        return self._difference


def _final(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """The model's logits: some families scale or bound what the head computes."""
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if bound := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / bound) * bound
    return logits
