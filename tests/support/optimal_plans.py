"""Plans of the policy ``optimal``, and their objective computed independently from their slots."""

from typing import Any

import numpy as np
import planning_inputs as inputs

from rq_compile.calibration.schema import Calibration
from rq_compile.planning.demand import demand
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import LayerPlan, Optimality, Plan


def optimal(calibration: Calibration, **options: Any) -> Plan:
    arguments: dict[str, Any] = {"memory": 1.0, "ranks": 1, "target": "batched", **options}
    return make_plan(calibration, policy="optimal", **arguments)


def optimality(plan: Plan) -> Optimality:
    assert plan.optimality is not None
    return plan.optimality


def predicted(layer: LayerPlan) -> Any:
    """All figures: those that a plan may lack are in the plans of these tests."""
    return layer.predicted


def objective(plan: Plan, calibration: Calibration, tolerance: float = 0.01, hedge: float = 0.0, waits: bool = True) -> float:
    """The objective of docs/planning.md for any plan, computed from its slots."""
    total, goal = 0.0, 1 + tolerance
    for layer, counted in zip(plan.layers, calibration.layers, strict=True):
        copies = np.array(inputs.copies(layer))
        load = demand(counted, 1.0) / copies
        held = [[slot.expert for slot in layer.slots if slot.rank == rank] for rank in range(plan.ranks)]
        busiest = load.max() if plan.ranks == 1 else max(load[:, mine].sum(axis=1).max() for mine in held)
        mean = 1.0 if plan.ranks == 1 else layer.geometry.experts / plan.ranks
        if waits:
            drifted = drift_imbalance(demand(counted, 1.0).max(axis=0), copies, layer, goal if plan.ranks == 1 else np.inf)
            total += max(0.0, busiest / mean - goal) + hedge * max(0.0, drifted - goal)
        total += sum(
            counted.error[slot.format][slot.expert] / copies[slot.expert] for slot in layer.slots if slot.format != "bf16"
        )
    return total


def drift_imbalance(load: np.ndarray, copies: np.ndarray, layer: LayerPlan, goal: float) -> float:
    """With the default ``drift``. A layer above ``goal`` counts as one that just meets it, plus the excess."""
    geometry = layer.geometry
    gain = np.maximum(0, np.minimum(np.minimum(1.0, 4 * load), geometry.experts / geometry.top_k - load))
    out_of_balance = 0.0
    if (load / copies).max() > goal + 1e-9:
        busiest = (load / copies).max()
        copies = np.ceil(load / (goal + 1e-9))
        out_of_balance = busiest - (load / copies).max()
    return out_of_balance + ((load + gain) / copies).max()
