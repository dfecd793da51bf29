"""The difference between the next-token distributions of an engine and the reference, accumulated window by window."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities over the last dimension. Rows with an infinite logit or NaN become NaN."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted -= shifted.max(axis=-1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _exp(value: float) -> float:
    """``exp(value)``, or infinity if a float64 cannot hold it."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


@dataclass
class Divergence:
    """Running sums over predicted positions, in nats."""

    predictions: int = 0
    loss_reference: float = 0.0
    loss_engine: float = 0.0
    agreements: int = 0
    kl_sum: float = 0.0

    def add(self, reference: np.ndarray, engine: np.ndarray, targets: np.ndarray) -> None:
        """Add logits ``[positions, vocabulary]`` of both sides for the int64 ``targets [positions]``."""
        log_p, log_q = log_softmax(reference), log_softmax(engine)
        rows = np.arange(len(targets))
        self.predictions += len(targets)
        self.loss_reference -= float(log_p[rows, targets].sum())
        self.loss_engine -= float(log_q[rows, targets].sum())
        self.agreements += int((reference.argmax(axis=-1) == engine.argmax(axis=-1)).sum())
        self.kl_sum += float((np.exp(log_p) * (log_p - log_q)).sum())

    @classmethod
    def sum(cls, parts: "Iterable[Divergence]") -> "Divergence":
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole

    def merge(self, other: "Divergence") -> None:
        self.predictions += other.predictions
        self.loss_reference += other.loss_reference
        self.loss_engine += other.loss_engine
        self.agreements += other.agreements
        self.kl_sum += other.kl_sum

    @property
    def perplexity_reference(self) -> float:
        return _exp(self.loss_reference / self.predictions)

    @property
    def perplexity_engine(self) -> float:
        return _exp(self.loss_engine / self.predictions)

    @property
    def agreement(self) -> float:
        return self.agreements / self.predictions

    @property
    def kl(self) -> float:
        return self.kl_sum / self.predictions
