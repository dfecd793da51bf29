"""Checks whether a calibration ran enough text for every expert."""

from rq_compile.calibration.schema import Calibration

# With fewer tokens, an expert's error and its share of the tokens are imprecise (measured in docs/calibration.md).
ENOUGH = 256
NAMED = 3


def few_tokens(calibration: Calibration) -> str | None:
    """A sentence about the experts that received fewer than ``ENOUGH`` tokens, or None."""
    few = [(load, layer.index, expert) for layer in calibration.layers for expert, load in enumerate(layer.load) if load < ENOUGH]
    if not few:
        return None
    experts = sum(layer.geometry.experts for layer in calibration.layers)
    named = ", ".join(f"expert {expert} of layer {layer} with {load}" for load, layer, expert in sorted(few)[:NAMED])
    # So many that all but a tenth of the experts have enough; some experts see a language or a subject alone.
    typical = sorted(load for layer in calibration.layers for load in layer.load)[experts // 10]
    needed = -(-calibration.tokens * ENOUGH // max(1, typical))
    return (
        f"{len(few)} of {experts} experts saw fewer than {ENOUGH} tokens ({named}), so that their errors and loads are rough; "
        f"run text of more kinds, about {max(needed, calibration.tokens + 1):,} tokens in all (--tokens), "
        "or merge another calibration"
    )
