"""Plans of tiny checkpoints: one that changes nothing, one with copies of experts and every format."""

from collections.abc import Callable

import numpy as np
import tiny

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.planning.schema import LayerPlan, LayerPrediction, Plan, Slot
from rq_compile.quantization.formats import Format

MIXED: tuple[Format, ...] = ("fp32", "int8", "int4")


def plan_of(checkpoint: Model, slots: Callable[[MoeLayer], list[Slot]]) -> Plan:
    prediction = LayerPrediction(
        lis_before=1, lis_after=1, strict_lis_before=1, strict_lis_after=1, bytes_before=1, bytes_after=1, error=0
    )
    layers = [
        LayerPlan(name=layer.name, index=layer.index, geometry=layer.geometry, slots=slots(layer), predicted=prediction)
        for layer in checkpoint.layers
    ]
    return Plan(
        tool="test",
        model=checkpoint.name,
        model_type=checkpoint.model_type,
        fingerprint=checkpoint.fingerprint,
        calibration_sha256=None,
        policy="none",
        target="cpu",
        memory=4.0,
        layers=layers,
    )


def unchanged(layer: MoeLayer) -> list[Slot]:
    return [Slot(expert=expert, format="fp32") for expert in range(layer.geometry.experts)]


def format_of(expert: int) -> Format:
    return MIXED[expert % len(MIXED)]


def replicated_and_quantized(layer: MoeLayer) -> list[Slot]:
    """Every format is there, experts 0 and 1 have copies, and the slots are in no order."""
    experts = [*range(layer.geometry.experts), 1, 0, 1]
    return [Slot(expert=expert, format=format_of(expert)) for expert in reversed(experts)]


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, tiny.VOCABULARY, shape)
