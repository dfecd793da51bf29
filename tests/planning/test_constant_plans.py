"""Plans in which mean outputs replace experts: what they cost, and that they leave the balance of the others alone."""

from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest

from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.evaluation.balance import balance
from rq_compile.planning.metrics import slot_loads
from rq_compile.planning.plan import make_plan
from rq_compile.planning.replan import replan
from rq_compile.planning.schema import LayerPlan, Plan

MEASURED = "int8, int4, constant"


def skewed(**options: Any) -> Calibration:
    """In which ``constant`` loses each expert's whole share of the output, and a quarter of the experts hardly contribute."""
    made = inputs.skewed(**options)
    layers = []
    for layer in made.layers:
        share = np.array(layer.error["int4"]) / 6e-3
        share[::4] *= 1e-3
        error = {format: (share * rate).tolist() for format, rate in (("int8", 2.5e-5), ("int4", 6e-3), ("constant", 0.8))}
        layers.append(layer.model_copy(update={"error": error}))
    return made.model_copy(update={"layers": layers})


def planned(calibration: Calibration, memory: float = 0.25, policy: str = "optimal", **options: Any) -> Plan:
    how: dict[str, Any] = {"ranks": 1, "target": "cpu"} | options
    return make_plan(calibration, policy=policy, memory=memory, **how)


def constant(plan: Plan) -> int:
    return sum(len(layer.constant_experts) for layer in plan.layers)


def test_little_memory_goes_to_the_experts_that_matter() -> None:
    """With no replicas, this is a knapsack, whose bound is tight."""
    calibration = skewed()
    plan = planned(calibration)
    without = planned(calibration, memory=0.2917, formats="int8, int4")  # the least without constant experts
    assert constant(plan) > 8
    assert constant(without) == 0
    assert plan.bytes_after < without.bytes_after
    assert np.mean([layer.predicted.error for layer in plan.layers]) < np.mean(
        [layer.predicted.error for layer in without.layers]
    )
    assert plan.optimality
    assert plan.optimality.gap < 0.05
    geometry = plan.layers[0].geometry
    assert (
        plan.stored_bytes
        == plan.bytes_after
        == sum(
            4 * geometry.hidden if slot.format == "constant" else inputs.slot_bytes(geometry, slot.format)
            for layer in plan.layers
            for slot in layer.slots
        )
    )
    for layer, measured in zip(plan.layers, calibration.layers, strict=True):
        lost = [measured.error[slot.format][slot.expert] if slot.format != "bf16" else 0 for slot in layer.slots]
        assert layer.predicted.error == pytest.approx(sum(lost))
    assert any(f"{constant(plan)} experts are replaced by their mean outputs" in remark for remark in plan.remarks)


@pytest.mark.parametrize(("target", "ranks"), [("batched", 1), ("cuda", 4), ("cpu", 2)])
def test_constant_experts_have_no_load_to_balance(target: str, ranks: int) -> None:
    calibration = skewed(top_k=4)
    plan = planned(calibration, memory=0.4, target=target, ranks=ranks, formats="bf16, int4, constant")
    assert constant(plan) > 4
    assert plan.optimality is None
    for layer, measured in zip(plan.layers, calibration.layers, strict=True):
        held = [slot.expert for slot in layer.slots]
        assert all(held.count(expert) == 1 for expert in layer.constant_experts)
        rows = slot_loads(np.array(measured.load), held)
        busy = rows[[slot.computed for slot in layer.slots]]
        experts = 16 - len(layer.constant_experts)
        assert layer.predicted.lis_after == pytest.approx(max(1.0, busy.max() * experts / busy.sum()))
        assert layer.predicted.strict_lis_after == pytest.approx(busy.max() * len(busy) / busy.sum())
        found = balance(plan.model_copy(update={"layers": [layer]}), {layer.name: rows})[0]
        assert found.lis_after == layer.predicted.lis_after
        assert found.lis_before == layer.predicted.lis_before
        assert found.rank_imbalance_after == layer.predicted.rank_imbalance_after
    waited = [p.lis_after if ranks == 1 else p.rank_imbalance_after for p in (layer.predicted for layer in plan.layers)]
    assert np.mean(np.array(waited, float)) < 1.1


def test_a_slot_without_work_takes_no_time() -> None:
    calibration = skewed()
    plan, whole = planned(calibration), planned(calibration, memory=0.2917, formats="int8, int4")
    for layer, other in zip(plan.layers, whole.layers, strict=True):
        if layer.constant_experts:
            assert layer.predicted.step_time_after
            assert other.predicted.step_time_after
            assert layer.predicted.step_time_after < other.predicted.step_time_after


def everything_constant(layer: LayerPlan) -> LayerPlan:
    slots = [slot.model_copy(update={"format": "constant"}) for slot in layer.slots]
    return LayerPlan(**{**layer.model_dump(), "slots": [slot.model_dump() for slot in slots]})


def test_a_layer_of_constants_is_balanced() -> None:
    plan = planned(skewed(), memory=1.0)
    layer = everything_constant(plan.layers[0])
    found = balance(plan.model_copy(update={"layers": [layer]}), {layer.name: np.arange(16)})[0]
    assert (found.lis_after, found.strict_lis_after) == (1.0, 1.0)
    assert found.lis_before > 1.5


@pytest.mark.parametrize("policy", ["uniform", "random", "frequency"])
def test_other_policies_take_constants_only_where_nothing_else_fits(policy: str) -> None:
    for memory in (0.3, 0.6, 1.0):
        assert constant(planned(skewed(), memory, policy)) == 0
    if policy == "uniform":
        with pytest.raises(UserError, match="policy uniform takes"):
            planned(skewed(), 0.2, policy)
        assert constant(planned(skewed(), 0.2, policy, format="constant")) == 4 * 16
    else:
        assert 0 < constant(planned(skewed(), 0.2, policy)) < 4 * 16


def test_new_loads_for_a_plan_with_constants() -> None:
    """A target that does not wait changes nothing; others would have to balance anew."""
    calibration = skewed()
    plan = planned(calibration)
    same, changes = replan(plan, calibration)
    assert changes.count == 0
    assert [layer.slots for layer in same.layers] == [layer.slots for layer in plan.layers]
    waiting = planned(calibration, memory=0.3, target="batched")
    assert constant(waiting)
    with pytest.raises(
        UserError, match=rf"replaces {constant(waiting)} experts by their mean outputs, and replan cannot balance"
    ):
        replan(waiting, calibration)
