"""LIS per layer, from the rows that an engine's slots received."""

import numpy as np

from rq_compile.evaluation.schema import LayerBalance
from rq_compile.planning.metrics import lis, of_computed, rank_imbalance, rank_loads, strict_lis
from rq_compile.planning.schema import LayerPlan, Plan


def logical_loads(layer: LayerPlan, slot_loads: np.ndarray) -> np.ndarray:
    """Rows per logical expert ``[experts]``, from rows per slot ``[slots]``."""
    experts = [slot.expert for slot in layer.slots]
    return np.bincount(experts, weights=slot_loads, minlength=layer.geometry.experts).astype(np.int64)


def balance(plan: Plan, slot_loads: dict[str, np.ndarray]) -> list[LayerBalance]:
    """LIS of every layer, as defined in docs/words.md.

    Raises:
        ValueError: a layer's slots received no rows at all.
    """
    return [_layer_balance(layer, slot_loads[layer.name], plan.ranks) for layer in plan.layers]


def _layer_balance(layer: LayerPlan, slots: np.ndarray, ranks: int) -> LayerBalance:
    if slots.sum() == 0:
        raise ValueError(f"no row reached layer {layer.index}")
    logical = logical_loads(layer, slots)
    computed, busy = of_computed(layer.slots, slots)
    return LayerBalance(
        name=layer.name,
        index=layer.index,
        lis_before=float(lis(logical, layer.geometry.experts)),
        lis_after=float(lis(busy, len({slot.expert for slot in computed}))),
        strict_lis_before=float(strict_lis(logical)),
        strict_lis_after=float(strict_lis(busy)),
        **(_rank_balance(layer, logical, slots, ranks) if ranks > 1 else {}),
    )


def _rank_balance(layer: LayerPlan, logical: np.ndarray, slots: np.ndarray, ranks: int) -> dict[str, float]:
    computed, busy = of_computed(layer.slots, slots)
    blocks = [expert * ranks // layer.geometry.experts for expert in range(layer.geometry.experts)]
    return {
        "rank_imbalance_before": float(rank_imbalance(rank_loads(logical, blocks, ranks))),
        "rank_imbalance_after": float(rank_imbalance(rank_loads(busy, [slot.rank for slot in computed], ranks))),
    }
