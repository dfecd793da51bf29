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
    """``agreement`` is the fraction of positions with the same top-1 token, ``kl`` the mean KL(reference || engine) in nats."""

    name: str
    tokens: int
    predictions: int
    perplexity_reference: float
    perplexity_engine: float
    agreement: float
    kl: float
    layers: list[LayerBalance]


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
