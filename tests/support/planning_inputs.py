"""Calibrations for the planner's tests, made from given numbers, and independent computations on plans."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.calibration.schema import Calibration, CalibrationText, LayerCalibration
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.quantization.formats import Block, Format

INDEX = 3  # the first decoder layer with experts, so that places and indices differ


def layer(
    texts: Sequence[Sequence[int]],
    errors: Mapping[Any, Sequence[float]],
    *,
    place: int = 0,
    top_k: int = 1,
    wanda: Sequence[float] | None = None,
    hidden: int = 64,
    intermediate: int = 32,
    block: int = 128,
    batches: Sequence[Sequence[int]] | None = None,
) -> LayerCalibration:
    experts = len(texts[0])
    shape = {"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate}
    return LayerCalibration(
        name=f"model.layers.{INDEX + place}.mlp.experts",
        index=INDEX + place,
        geometry=ExpertGeometry(**shape, activation="swiglu", block=cast(Block, block)),
        load=np.sum(texts, axis=0).tolist(),
        text_loads=[list(text) for text in texts],
        batch_loads=[list(batch) for batch in (texts if batches is None else batches)],
        wanda=list(wanda or [1.0] * experts),
        error={format: list(values) for format, values in errors.items()},
    )


def calibration(layers: list[LayerCalibration], dtype: str = "bf16") -> Calibration:
    return Calibration(
        tool="test",
        model="model",
        model_type="olmoe",
        fingerprint="0123456789abcdef" * 4,
        dtype=cast(Format, dtype),
        texts=[CalibrationText(name=f"{t}.txt", sha256="0" * 64, tokens=1) for t in range(len(layers[0].text_loads))],
        tokens=1,
        measured_tokens=1,
        padding_tokens=0,
        batch_size=8,
        sequence_length=64,
        wanda_fraction=0.5,
        quantizer="nearest",
        statistics=None,
        layers=layers,
    )


def skewed(
    layers: int = 4,
    experts: int = 16,
    *,
    texts: int = 2,
    top_k: int = 2,
    seed: int = 0,
    rows: int = 40_000,
    hidden: int = 64,
    intermediate: int = 32,
) -> Calibration:
    """Loads and errors like those of trained models: lognormal loads, int8 nearly exact, int4 a few thousandths in a whole
    layer."""
    random = np.random.default_rng(seed)
    made = []
    for place in range(layers):
        base = random.lognormal(0, 1, experts)
        shares = [base * random.lognormal(0, 0.3, experts) for _ in range(texts)]
        loads = [random.multinomial(rows, share / share.sum()) for share in shares]
        batches = [random.multinomial(rows // 16, load / load.sum()) for load in loads for _ in range(16)]
        weight = random.lognormal(0, 0.7, experts) * np.sum(loads, axis=0) / np.sum(loads)
        weight /= weight.sum()
        made.append(
            layer(
                [load.tolist() for load in loads],
                {"int8": (2.5e-5 * weight).tolist(), "int4": (6e-3 * weight).tolist()},
                place=place,
                top_k=top_k,
                wanda=random.random(experts).tolist(),
                hidden=hidden,
                intermediate=intermediate,
                batches=[batch.tolist() for batch in batches],
            )
        )
    return calibration(made)


def plan_bytes(plan: Plan) -> int:
    """Bytes of all slots, computed only from the definition of the formats."""
    return sum(slot_bytes(layer.geometry, slot.format) for layer in plan.layers for slot in layer.slots)


def slot_bytes(geometry: ExpertGeometry, format: str) -> int:
    matrices = [(2 * geometry.intermediate, geometry.hidden), (geometry.hidden, geometry.intermediate)]
    if format in ("fp32", "fp16", "bf16"):
        return sum(rows * columns for rows, columns in matrices) * (4 if format == "fp32" else 2)
    total = 0
    for rows, columns in matrices:
        block = next((size for size in (128, 64, 32, 16) if size <= geometry.block and columns % size == 0), 16)
        blocks = -(-columns // block)
        total += rows * blocks * (block * int(format.removeprefix("int")) // 8 + 4)
    return total


def copies(layer: LayerPlan) -> list[int]:
    count = Counter(slot.expert for slot in layer.slots)
    return [count[expert] for expert in range(layer.geometry.experts)]


def mean_lis(plan: Plan, when: str = "after") -> float:
    return float(np.mean([getattr(layer.predicted, f"lis_{when}") for layer in plan.layers]))
