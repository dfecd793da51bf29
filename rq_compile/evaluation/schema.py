"""The results of an evaluation and of a benchmark, for programs."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rq_compile.bounds import Count, Imbalance, LayerNumber, NonNegative, Positive, Sha256, Share
from rq_compile.files import Document, Name
from rq_compile.versions import Versioned

Perplexity = Annotated[float, Field(ge=1e-300)]


class LayerBalance(Document):
    """LIS of one layer on one text: ``before`` over logical experts, ``after`` over slots as the engine filled them.

    ``rank_imbalance``: busiest rank divided by the mean; ``before`` with the experts in consecutive blocks. None with one rank.
    """

    name: str
    index: LayerNumber
    lis_before: Imbalance
    lis_after: Imbalance
    strict_lis_before: Imbalance
    strict_lis_after: float = Field(ge=1, le=1e6)
    rank_imbalance_before: Imbalance | None = None
    rank_imbalance_after: Imbalance | None = None


class TextEvaluation(Document):
    """``agreement`` is the fraction of positions with the same top-1 token, ``kl`` the mean KL(reference || engine) in nats.

    A perplexity or KL is None if it is infinite or NaN. ``layers`` is empty if the engine does not count the rows of its
    slots, as with the lowering ``cuda``.
    """

    name: Name
    tokens: Count
    predictions: Count
    perplexity_reference: Perplexity | None
    perplexity_engine: Perplexity | None
    agreement: Share
    kl: float | None
    layers: list[LayerBalance]

    @property
    def perplexity_change(self) -> float | None:
        """Change from the reference to the engine, in per cent; None if one of the perplexities is None."""
        if self.perplexity_engine is None or self.perplexity_reference is None:
            return None
        return 100 * (self.perplexity_engine / self.perplexity_reference - 1)


class Evaluation(Versioned):
    called: ClassVar[str] = "evaluation"
    command: ClassVar[str] = "rq-compile evaluate --json"

    schema_version: Literal[1] = 1
    kind: Literal["evaluation"] = "evaluation"
    engine: Name
    reference: Name
    sequence_length: Count
    texts: list[TextEvaluation] = Field(min_length=1)
    total: TextEvaluation
    expert_bytes_before: Count
    expert_bytes_after: Count

    @model_validator(mode="after")
    def has_every_layer_in_every_text(self) -> Self:
        known = [(layer.name, layer.index) for layer in self.total.layers]
        for text in self.texts:
            if [(layer.name, layer.index) for layer in text.layers] != known:
                raise ValueError(f"text {text.name} has other layers than the total")
        return self


class Speed(Document):
    """Medians over the rounds, in tokens per second."""

    name: Name
    prefill: Positive
    decode: Positive


class Bench(Versioned):
    """``ratio_*``: engine / other; None if there is no other side. ``machine``: see ``describe_machine``. ``weights_sha256``: of
    the engine's weights file. Both are None in documents of earlier versions.
    """

    called: ClassVar[str] = "benchmark"
    command: ClassVar[str] = "rq-compile bench --json"

    schema_version: Literal[1] = 1
    kind: Literal["bench"] = "bench"
    machine: str | None = None
    weights_sha256: Sha256 | None = None
    prompt_tokens: Count
    new_tokens: Count
    rounds: Count
    threads: int | None = Field(ge=1, le=2**16)
    engine: Speed
    other: Speed | None
    ratio_prefill: NonNegative | None
    ratio_decode: NonNegative | None
