"""Plans with experts in 3 and 2 bits, and the way to them where a calibration did not measure these formats."""

import re
from statistics import median
from typing import Any

import planning_inputs as inputs
import pytest

from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.planning.plan import CHOOSE_FORMATS, make_plan
from rq_compile.planning.replan import replan
from rq_compile.planning.schema import Plan, Target
from rq_compile.planning.targets import TARGETS
from rq_compile.quantization.formats import Format, matrix_bytes

pytestmark = pytest.mark.quick

# The errors relative to those of int4, as in docs/results.md.
TIMES_INT4: dict[Format, float] = {"int3": 4.0, "int2": 20.0}
FEW_BITS = tuple(TIMES_INT4)


def measured_in(calibration: Calibration, *formats: Format) -> Calibration:
    """``calibration`` that also measured the experts in ``formats``."""
    layers = [
        layer.model_copy(
            update={"error": layer.error | {f: [TIMES_INT4[f] * error for error in layer.error["int4"]] for f in formats}}
        )
        for layer in calibration.layers
    ]
    return calibration.model_copy(update={"layers": layers})


def planned(calibration: Calibration, policy: str = "optimal", **options: Any) -> Plan:
    return make_plan(calibration, policy=policy, **{"memory": 1.0, "ranks": 1, "target": "cpu", **options})


def formats_in(plan: Plan) -> set[Format]:
    return {slot.format for layer in plan.layers for slot in layer.slots}


@pytest.mark.parametrize(("columns", "bits"), [(128, 3.25), (1024, 3.25), (64, 3.5), (32, 4.0), (48, 6.0)])
def test_bytes_of_3_bits(columns: int, bits: float) -> None:
    """Whole words of four bytes in every block, and its scale. In blocks of 16, 3 bits take the two words of 4 bits."""
    assert matrix_bytes("int3", 10, columns) * 8 == 10 * columns * bits
    assert matrix_bytes("int2", 10, 128) * 8 == 10 * 128 * 2.25


@pytest.mark.parametrize("policy", CHOOSE_FORMATS)
@pytest.mark.parametrize(("memory", "needed"), [(0.25, ("int3",)), (0.19, FEW_BITS)])
def test_a_budget_that_needs_fewer_bits_names_them(policy: str, memory: float, needed: tuple[Format, ...]) -> None:
    calibration = inputs.skewed(layers=2)
    asked = ",".join(("int8", "int4", *needed))
    with pytest.raises(UserError, match=rf"; give --memory 0\.\d+ or more, or calibrate again with --formats {asked}$"):
        planned(calibration, policy, memory=memory)
    plan = planned(measured_in(calibration, *needed), policy, memory=memory)
    assert needed[-1] in formats_in(plan)
    assert plan.stored_bytes <= memory * plan.bytes_before
    assert sum(layer.predicted.bytes_after for layer in plan.layers) == plan.bytes_after


@pytest.mark.parametrize("measured", [(), ("int3",), FEW_BITS])
def test_a_budget_that_no_bits_meet_names_none(measured: tuple[Format, ...]) -> None:
    with pytest.raises(UserError, match=r"; give --memory 0\.\d+ or more$"):
        planned(measured_in(inputs.skewed(layers=1), *measured), memory=0.1)


def test_few_bits_where_they_hurt_least() -> None:
    """In a plan in 3 bits on average, the experts with the smallest errors get 2 bits. It beats one format for all."""
    calibration = measured_in(inputs.skewed(layers=3), *FEW_BITS)
    plan = planned(calibration, memory=0.21)
    assert {"int2", "int4"} < formats_in(plan)
    for layer, known in zip(plan.layers, calibration.layers, strict=True):
        error = {slot.expert: known.error["int4"][slot.expert] for slot in layer.slots}
        few, many = ([error[slot.expert] for slot in layer.slots if slot.format == held] for held in ("int2", "int4"))
        assert not few or not many or median(few) < median(many)
    uniform = planned(calibration, "uniform", memory=0.21)
    assert formats_in(uniform) <= set(FEW_BITS)
    assert sum(layer.predicted.error for layer in plan.layers) < sum(layer.predicted.error for layer in uniform.layers)


def test_the_paper_s_copy_in_few_bits() -> None:
    calibration = inputs.skewed(layers=1)
    with pytest.raises(UserError, match=r"not measured in int2; choose one of int8, int4 with .*, or calibrate again with --f"):
        planned(calibration, "paper", format="int2")
    assert formats_in(planned(measured_in(calibration, "int2"), "paper", format="int2")) == {"bf16", "int2"}


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("target", [target for target, costs in TARGETS.items() if costs.few_bits])
def test_targets_that_store_them_use_and_replan_them(target: Target, ranks: int) -> None:
    calibration = measured_in(inputs.skewed(layers=2), *FEW_BITS)
    plan = planned(calibration, memory=0.21, target=target, ranks=ranks)
    assert formats_in(plan) & set(FEW_BITS)
    assert not [remark for remark in plan.remarks if "int3" in remark]
    assert inputs.plan_bytes(plan) == plan.bytes_after
    assert plan.stored_bytes <= 0.21 * plan.bytes_before
    again, _ = replan(plan, calibration)
    assert formats_in(again) == formats_in(plan)
    assert again.stored_bytes <= 0.21 * plan.bytes_before
    assert all(sum(slot.expert == e for slot in layer.slots) for layer in again.layers for e in range(layer.geometry.experts))


def test_which_targets_store_them() -> None:
    assert [target for target, costs in TARGETS.items() if costs.few_bits] == ["cpu", "cuda", "tensorrt"]


@pytest.mark.parametrize("target", [target for target, costs in TARGETS.items() if not costs.few_bits])
def test_targets_that_store_them_as_int4_do_not_use_them(target: str) -> None:
    calibration = inputs.skewed(layers=2)
    few = measured_in(calibration, *FEW_BITS)
    plan, before = (planned(one, memory=0.5, target=target) for one in (few, calibration))
    assert plan.layers == before.layers
    assert f"Engines for {target} store int3 and int2 as int4, so the plan does not use them." in plan.remarks
    for policy, option in (("uniform", "format"), ("paper", "format"), ("optimal", "formats")):
        with pytest.raises(UserError, match=f"engines for {target} store int2 as int4, so .*; choose int4"):
            planned(few, policy, target=target, **{option: "int2"})
    with pytest.raises(UserError, match=r"; give --memory 0\.\d+ or more$"):
        planned(few, memory=0.2, target=target)


def test_what_was_measured_does_not_change_what_is_planned_without_it() -> None:
    calibration = inputs.skewed(layers=3)
    plain = planned(calibration, memory=0.5)
    told = planned(measured_in(calibration, *FEW_BITS), memory=0.5, formats="bf16,int8,int4")
    assert told.layers == plain.layers


def test_no_message_is_about_a_format_of_more_bits() -> None:
    """The experts of a checkpoint in int4 cannot shrink to int8."""
    calibration = inputs.skewed(layers=1)
    layers = [layer.model_copy(update={"error": {"int4": [0.0] * 16}}) for layer in calibration.layers]
    with pytest.raises(UserError) as refusal:
        planned(calibration.model_copy(update={"dtype": "int4", "layers": layers}), memory=0.8)
    assert re.search(r"or calibrate again with --formats int8,int4,int3$", str(refusal.value))
