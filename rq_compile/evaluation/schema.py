"""What an evaluation and a benchmark found, for a program to read."""

from rq_compile.files import Document


class LayerBalance(Document):
    """LIS of one layer on one text: ``before`` over logical experts, ``after`` over slots as the engine filled them.

    ``rank_imbalance``: busiest over mean rank, ``before`` with the experts in consecutive blocks; None for a plan of one rank.
    """

    name: str
    index: int
    lis_before: float
    lis_after: float
    strict_lis_before: float
    strict_lis_after: float
    rank_imbalance_before: float | None = None
    rank_imbalance_after: float | None = None


class TextEvaluation(Document):
    """``agreement`` is the fraction of positions with the same top-1 token, ``kl`` the mean KL(reference || engine) in nats.

    A perplexity or KL is None if it is infinite or undefined. ``layers`` is empty if the engine does not count the rows of its
    slots, as with the lowering ``cuda``.
    """

    name: str
    tokens: int
    predictions: int
    perplexity_reference: float | None
    perplexity_engine: float | None
    agreement: float
    kl: float | None
    layers: list[LayerBalance]

    @property
    def perplexity_change(self) -> float | None:
        """From the reference to the engine, in per cent; None if one of them is."""
        if self.perplexity_engine is None or self.perplexity_reference is None:
            return None
        return 100 * (self.perplexity_engine / self.perplexity_reference - 1)


class Evaluation(Document):
    engine: str
    reference: str
    sequence_length: int
    texts: list[TextEvaluation]
    total: TextEvaluation
    expert_bytes_before: int
    expert_bytes_after: int


class Speed(Document):
    """Medians over the rounds, tokens per second."""

    name: str
    prefill: float
    decode: float


class Bench(Document):
    """``ratio_*`` is engine / other, None without another side. ``machine``: see ``describe_machine``; ``weights_sha256`` is of
    the engine's weights file. Both are None in documents of earlier versions.
    """

    machine: str | None = None
    weights_sha256: str | None = None
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int | None
    engine: Speed
    other: Speed | None
    ratio_prefill: float | None
    ratio_decode: float | None
