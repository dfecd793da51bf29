"""Option ``worst_text``: what the text that is served worst counts beside all texts together."""

from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest

from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.planning.demand import demand
from rq_compile.planning.plan import make_plan
from rq_compile.planning.replan import replan
from rq_compile.planning.schema import Plan


def of_copies(calibration: Calibration, policy: str, **options: Any) -> Plan:
    """A plan that balances with copies alone: experts stay in the checkpoint's format."""
    options = {"formats": calibration.dtype, "hedge": 0, **options} if policy == "optimal" else options
    return make_plan(calibration, policy=policy, memory=1.5, ranks=1, target="batched", smoothing=0, **options)


def excess(calibration: Calibration, plan: Plan, weight: float) -> float:
    """The sum over the layers of the busiest slot's load above the goal, if the worst text counts with ``weight``."""
    total = 0.0
    for layer, planned in zip(calibration.layers, plan.layers, strict=True):
        texts = np.array(layer.text_loads, np.float64)
        together = np.array(layer.load) / np.mean(layer.load)
        worst = (texts / texts.mean(axis=1, keepdims=True)).max(axis=0)
        busiest = ((weight * worst + (1 - weight) * together) / inputs.copies(planned)).max()
        total += max(0.0, float(busiest) - 1.01)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_each_weight_is_best_at_what_it_counts(seed: int) -> None:
    calibration = inputs.skewed(texts=3, seed=seed)
    plans = {weight: of_copies(calibration, "optimal", worst_text=weight) for weight in (0.0, 0.5, 1.0)}
    rivals = [of_copies(calibration, policy) for policy in ("eplb", "craft")]
    for weight, plan in plans.items():
        own = excess(calibration, plan, weight)
        assert own <= min(excess(calibration, other, weight) for other in (*plans.values(), *rivals)) + 1e-9
    assert excess(calibration, plans[0.0], 0) < excess(calibration, plans[1.0], 0)
    assert excess(calibration, plans[1.0], 1) < excess(calibration, plans[0.0], 1)


def test_a_text_of_no_tokens_leaves_the_others() -> None:
    layer = inputs.layer([[8, 4, 2, 2], [0, 0, 0, 0]], {})
    assert demand(layer, 0, 0.5) == pytest.approx(np.array([[2, 1, 0.5, 0.5]]))


def test_all_texts_together_count_by_their_tokens() -> None:
    layer = inputs.layer([[9, 3, 0, 0], [0, 0, 3, 1]], {})
    assert demand(layer, 0, 0.0) == pytest.approx(np.array([[9, 3, 3, 1]] * 2) / 4)
    assert demand(layer, 0, 0.5)[1] == pytest.approx(np.array([9, 3, 15, 5]) / 8)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_loads_that_weights_have_rounded_to_nothing(smoothing: float) -> None:
    given = inputs.layer([[1, 1, 0, 0]], {}).model_dump()
    layer = LayerCalibration.model_validate(given | {"load": [0, 0, 0, 0]})
    assert np.isfinite(demand(layer, smoothing, 0.5)).all()


def test_replan_keeps_it() -> None:
    calibration, later = inputs.skewed(texts=3, seed=1), inputs.skewed(texts=3, seed=2)
    plan = of_copies(calibration, "optimal", worst_text=0.0)
    new, _ = replan(plan, later.model_copy(update={"fingerprint": plan.fingerprint}))
    assert new.options["worst_text"] == 0
    anew = {weight: replan(with_weight(plan, weight), later)[0] for weight in (0.0, 1.0)}
    assert excess(later, anew[0.0], 0) < excess(later, anew[1.0], 0)
    assert excess(later, anew[1.0], 1) < excess(later, anew[0.0], 1)


def with_weight(plan: Plan, weight: float) -> Plan:
    return plan.model_copy(update={"options": plan.options | {"worst_text": weight}})
