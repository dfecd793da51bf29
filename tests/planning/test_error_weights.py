"""Errors of layers count by the layers' sensitivities."""

from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest

from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.planning.plan import make_plan
from rq_compile.planning.problem import error_weights
from rq_compile.planning.schema import Plan

pytestmark = pytest.mark.quick

ERRORS: dict[str, list[float]] = {"int8": [1e-5, 2e-5, 3e-5, 4e-5], "int4": [1e-3, 2e-3, 3e-3, 4e-3]}


def calibrated(*sensitivities: float | None) -> Calibration:
    """Layers that differ only in their sensitivity."""

    def layer(place: int, sensitivity: float | None) -> LayerCalibration:
        made = inputs.layer([[40, 30, 20, 10]], ERRORS, place=place)
        return made.model_copy(update={"sensitivity": sensitivity, "stream_share": sensitivity and sensitivity / 10})

    return inputs.calibration([layer(place, sensitivity) for place, sensitivity in enumerate(sensitivities)])


def plan_of(calibration: Calibration, policy: str = "optimal", **options: Any) -> Plan:
    return make_plan(calibration, policy=policy, **{"memory": 0.4, "ranks": 1, "target": "cpu", **options})


def errors(plan: Plan) -> list[float]:
    return [layer.predicted.error for layer in plan.layers]


@pytest.mark.parametrize("policy", ["uniform", "optimal", "random", "frequency"])
def test_errors_of_a_plan_are_weighted(policy: str) -> None:
    calibration = calibrated(0.4, 0.1, 0.2)
    plan = plan_of(calibration, policy)
    for layer, known, weight in zip(plan.layers, calibration.layers, (2, 0.5, 1), strict=True):
        lost = sum(known.error[slot.format][slot.expert] for slot in layer.slots if slot.format != "bf16")
        assert layer.predicted.error == pytest.approx(weight * lost)


@pytest.mark.parametrize("sensitivities", [(None, None, None), (0.4, None, 0.2), (0.6, 0.6, 0.6)])
def test_layers_count_alike_unless_the_sensitivity_of_all_is_known(sensitivities: tuple[float | None, ...]) -> None:
    calibration = calibrated(*sensitivities)
    assert error_weights(calibration, in_nats=False) == [1.0, 1.0, 1.0]
    assert errors(plan_of(calibration)) == errors(plan_of(calibrated(None, None, None)))


def test_the_sensitive_layer_gets_the_bits() -> None:
    plan = plan_of(calibrated(0.1, 0.1, 2.0))
    small = [sum(slot.format == "int4" for slot in layer.slots) for layer in plan.layers]
    assert small[2] == 0 < min(small[:2])


@pytest.mark.parametrize("target", ["cpu", "batched"])
def test_one_extreme_layer_leaves_the_others_as_they_are(target: str) -> None:
    """In a layer in which an attention sink arises, outputs are a thousand times as large as the typical stream."""
    weights = error_weights(calibrated(0.1, 0.2, 0.3, 0.2, 5000.0), in_nats=False)
    np.testing.assert_allclose(weights, [0.5, 1, 1.5, 1, 25000])
    plan = plan_of(calibrated(0.2, 0.2, 5000.0), target=target, memory=1.0)
    assert {slot.format for slot in plan.layers[2].slots} <= {"bf16", "int8"}


def test_max_error_limits_the_weighted_mean() -> None:
    calibration = calibrated(0.5, 0.1, 0.01)
    plan = plan_of(calibration, memory=1.0, max_error=1e-3)
    assert 5e-4 < np.mean(errors(plan)) <= 1e-3
    assert sum(slot.format == "int4" for slot in plan.layers[2].slots) == 4
    assert sum(slot.format == "int4" for slot in plan.layers[0].slots) == 0


@pytest.mark.parametrize("policy", ["uniform", "frequency", "random"])
def test_the_error_that_a_plan_states_can_be_kept_in_its_bytes(policy: str) -> None:
    """Although the sums of errors round otherwise."""
    random = np.random.default_rng(3)
    for _ in range(12):
        scales = {"int8": 1e-5, "int4": 1e-3}
        layers = [
            inputs.layer(
                [[100] * 13], {format: list(scale * random.uniform(0.5, 2, 13)) for format, scale in scales.items()}, place=place
            ).model_copy(update={"sensitivity": random.uniform(0.01, 1)})
            for place in range(5)
        ]
        calibration = inputs.calibration(layers)
        theirs = plan_of(calibration, policy, target="batched", memory=0.6)
        most = float(np.mean(errors(theirs)))
        ours = plan_of(calibration, target="batched", memory=theirs.bytes_after / theirs.bytes_before, max_error=most)
        assert np.mean(errors(ours)) <= most * (1 + 1e-8)


@pytest.mark.parametrize("policy", ["uniform", "optimal", "random", "frequency"])
def test_weighted_errors_beyond_all_bounds(policy: str) -> None:
    """Bounded errors and sensitivities have products that a plan cannot hold."""
    calibration = calibrated(0.08, 0.08, 1e12)
    for layer in calibration.layers:
        layer.error.update({format: [2.0**53] * 4 for format in layer.error})
    plan = plan_of(calibration, policy, memory=0.6)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert max(errors(plan)) == 1e15
