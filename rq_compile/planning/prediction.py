"""The predictions in a plan, computed from the calibration and the slots alone."""

import numpy as np

from rq_compile.calibration.schema import LayerCalibration
from rq_compile.planning import metrics
from rq_compile.planning.capacity import capacity_classes, lane_groups
from rq_compile.planning.costs import CostModel
from rq_compile.planning.schema import BatchPrediction, LayerPrediction, Slot
from rq_compile.quantization.formats import Format

# Sequences; those that the calibration's batches add up to are reported.
BATCH_SIZES = (1, 8, 32, 128)


def with_capacity_classes(layer: LayerCalibration, slots: list[Slot]) -> list[Slot]:
    """``slots`` with their expected loads and with the capacity classes that pad the calibration texts least, equally
    weighted."""
    held = [slot.expert for slot in slots]
    rows = metrics.slot_loads(np.asarray(layer.load), held)
    load = rows / max(1, rows.sum())
    text_rows = metrics.slot_loads(np.asarray(layer.text_loads or [layer.load]), held)
    shares = text_rows / np.maximum(1, text_rows.sum(axis=1, keepdims=True))
    classes = capacity_classes(shares, [slot.format for slot in slots])
    return [
        slot.model_copy(update={"load": float(share), "capacity_class": int(number)})
        for slot, share, number in zip(slots, load, classes, strict=True)
    ]


def predict(
    layer: LayerCalibration,
    before: list[Slot],
    after: list[Slot],
    cost: CostModel,
    *,
    dtype: Format,
    batch_size: int,
    tokens: int,
    weight: float,
) -> LayerPrediction:
    """Every metric of ``planning.metrics`` for one layer, and its error times ``weight``.

    ``batch_size``: sequences of a calibration batch. ``tokens``: tokens of the step whose time is predicted.
    """
    geometry = layer.geometry
    values: dict[str, float | int | None] = {}
    for when, slots in (("before", before), ("after", after)):
        held = [slot.expert for slot in slots]
        lanes = lane_groups(slots)
        rows = metrics.slot_loads(np.asarray(layer.load), held)
        computed, busy = metrics.of_computed(slots, rows)
        _, text_rows = metrics.of_computed(slots, metrics.slot_loads(np.asarray(layer.text_loads or [layer.load]), held))
        experts = len({slot.expert for slot in computed})
        values[f"lis_{when}"] = float(metrics.lis(busy, experts))
        values[f"strict_lis_{when}"] = float(metrics.strict_lis(busy))
        values[f"worst_text_lis_{when}"] = float(metrics.lis(text_rows, experts).max())
        if cost.ranks > 1:
            on_ranks = metrics.rank_loads(busy, [slot.rank for slot in computed], cost.ranks)
            values[f"rank_imbalance_{when}"] = float(metrics.rank_imbalance(on_ranks))
        values[f"padded_work_{when}"] = float(metrics.padded_work(busy, lane_groups(computed)))
        values[f"step_time_{when}"] = cost.step_time(geometry, slots, rows, tokens, lanes)
        values[f"token_time_{when}"] = cost.step_time(geometry, slots, rows, 1, lanes)
        values[f"bytes_{when}"] = sum(geometry.expert_bytes(slot.format) for slot in slots)
    values["bytes_before"] = layer.stored_bytes or values["bytes_before"]
    return LayerPrediction(
        **values, error=weight * error(layer, after, dtype), over_batches=_over_batches(layer, after, batch_size)
    )


def _over_batches(layer: LayerCalibration, slots: list[Slot], batch_size: int) -> list[BatchPrediction]:
    found = []
    held = [slot.expert for slot in slots]
    experts = len({slot.expert for slot in slots if slot.computed})
    for sequences in (size for size in BATCH_SIZES if size % batch_size == 0):
        loads = metrics.over_batches(np.asarray(layer.batch_loads), sequences // batch_size)
        if len(loads) == 0:
            break
        before = metrics.lis(loads, layer.geometry.experts)
        _, busy = metrics.of_computed(slots, metrics.slot_loads(loads, held))
        after = metrics.lis(busy, experts)
        found.append(
            BatchPrediction(
                sequences=sequences,
                batches=len(loads),
                lis_mean_before=float(before.mean()),
                lis_mean_after=float(after.mean()),
                lis_p95_before=float(np.quantile(before, 0.95)),
                lis_p95_after=float(np.quantile(after, 0.95)),
            )
        )
    return found


def error(layer: LayerCalibration, slots: list[Slot], dtype: Format) -> float:
    """Expected relative error of the layer's output: each expert's, averaged over its copies, which share its tokens equally."""
    _, copies = metrics.copy_numbers([slot.expert for slot in slots])
    return float(
        sum(
            0.0 if slot.format == dtype and dtype not in layer.error else layer.error[slot.format][slot.expert] / c
            for slot, c in zip(slots, copies, strict=True)
        )
    )
