"""The results of an engine in one line."""

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from rq_compile.engine.manifest import Manifest
from rq_compile.evaluation.schema import Bench, Evaluation, LayerBalance
from rq_compile.files import Document, Name
from rq_compile.planning.schema import LayerPrediction


class Headline(Document):
    """``lis_*``: means over the layers, from all texts of the evaluation (measured) or from the plan (predicted).

    ``expert_bytes_before``: bytes of the experts in the checkpoint; ``_planned``: of all slots; ``_after``: in the engine, which
    stores identical copies once. ``prefill`` and ``decode`` are the engine's tokens per second divided by those of the other
    side. None: not measured, or not finite.
    """

    engine: Name
    model: Name
    lis_source: Literal["measured", "predicted"]
    lis_before: float
    lis_after: float
    expert_bytes_before: int
    expert_bytes_planned: int
    expert_bytes_after: int
    perplexity_reference: float | None
    perplexity_engine: float | None
    against: Name | None
    prefill: float | None
    decode: float | None

    @property
    def memory(self) -> float:
        return self.expert_bytes_after / max(1, self.expert_bytes_before)

    @property
    def perplexity_change(self) -> float | None:
        """In per cent."""
        if self.perplexity_engine is None or self.perplexity_reference is None:
            return None
        return 100 * (self.perplexity_engine / self.perplexity_reference - 1)

    @property
    def sentence(self) -> str:
        """The headline as a sentence for a title, a preview or a log."""
        parts = [f"LIS {self.lis_before:.2f} \N{RIGHTWARDS ARROW} {self.lis_after:.2f} ({self.lis_source})"]
        parts.append(f"{self.memory:.2f} x the experts' memory")
        if self.perplexity_change is not None:
            parts.append(f"perplexity {self.perplexity_change:+.2f} %")
        if self.prefill is not None and self.decode is not None:
            parts.append(f"{self.prefill:.1f} x prefill and {self.decode:.1f} x decode speed of {self.against}")
        return ", ".join(parts)


def headline(engine: str, manifest: Manifest, evaluation: Evaluation | None, bench: Bench | None) -> Headline:
    """The headline of the engine called ``engine``."""
    plan = manifest.plan
    measured: Sequence[LayerBalance] = evaluation.total.layers if evaluation is not None else []
    balances: Sequence[LayerBalance | LayerPrediction] = measured or [layer.predicted for layer in plan.layers]
    return Headline(
        engine=engine,
        model=plan.model,
        lis_source="measured" if measured else "predicted",
        lis_before=fmean(layer.lis_before for layer in balances),
        lis_after=fmean(layer.lis_after for layer in balances),
        expert_bytes_before=plan.bytes_before,
        expert_bytes_planned=plan.bytes_after,
        expert_bytes_after=manifest.expert_bytes,
        perplexity_reference=None if evaluation is None else evaluation.total.perplexity_reference,
        perplexity_engine=None if evaluation is None else evaluation.total.perplexity_engine,
        against=None if bench is None or bench.other is None else bench.other.name,
        prefill=None if bench is None else bench.ratio_prefill,
        decode=None if bench is None else bench.ratio_decode,
    )
