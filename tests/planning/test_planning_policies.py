"""The baseline policies, and properties of the plans of all policies."""

from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest

from rq_compile.errors import UserError
from rq_compile.lowerings import LOWERINGS
from rq_compile.planning.budget import allowed
from rq_compile.planning.plan import POLICIES, make_plan
from rq_compile.planning.policies.eplb import rebalance
from rq_compile.planning.remarks import lost_with_lowering
from rq_compile.planning.schema import LayerPlan, Plan

pytestmark = pytest.mark.quick


def held(layer: LayerPlan) -> list[tuple[int, str]]:
    return [(slot.expert, slot.format) for slot in layer.slots]


def plan_of(layers: list, policy: str, dtype: str = "bf16", **options: Any) -> Plan:
    arguments: dict[str, Any] = {"memory": 1.0, "ranks": 1, "target": "batched", **options}
    return make_plan(inputs.calibration(layers, dtype), policy=policy, **arguments)


# none


def test_none_is_the_checkpoint_in_consecutive_blocks() -> None:
    layer = inputs.layer([[5, 1, 1, 1]], {"int8": [0.0] * 4})
    plan = plan_of([layer], "none", ranks=2)
    assert held(plan.layers[0]) == [(expert, "bf16") for expert in range(4)]
    assert [slot.rank for slot in plan.layers[0].slots] == [0, 0, 1, 1]
    predicted = plan.layers[0].predicted
    assert predicted.lis_before == predicted.lis_after == pytest.approx(2.5)
    assert predicted.rank_imbalance_after == pytest.approx(6 / 4)
    assert predicted.error == 0


# paper


PAPER = inputs.layer([[10, 70, 10, 10]], {"int8": [0.01, 0.02, 0.03, 0.04]}, wanda=[0.1, 0.9, 0.5, 0.7])


def test_paper_to_the_letter() -> None:
    plan = plan_of([PAPER], "paper", memory=1.1, in_place=1)
    # Expert 1 is the busiest and also has the highest score, so the next one, expert 3, is quantized in place.
    assert held(plan.layers[0]) == [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "int8"), (1, "int8")]
    assert plan.layers[0].predicted.lis_after == pytest.approx(35 / 25)
    # Half of expert 1's tokens, and all of expert 3's, are computed in int8.
    assert plan.layers[0].predicted.error == pytest.approx(0.02 / 2 + 0.04)
    assert any("differ in format" in remark for remark in plan.remarks)


def test_paper_can_quantize_the_heavy_hitter_itself() -> None:
    plan = plan_of([PAPER], "paper", memory=1.1, in_place=1, skip_heavy_hitter=False)
    assert held(plan.layers[0]) == [(0, "bf16"), (1, "int8"), (2, "bf16"), (3, "bf16"), (1, "int8")]


def test_paper_counts_the_scales_and_quantizes_as_many_more_as_they_need() -> None:
    with pytest.raises(
        UserError, match=r"layer 3 under policy paper takes .* bytes, .* more than --memory 1 allows; give --memory"
    ):
        plan_of([PAPER], "paper", in_place=1)
    plan = plan_of([PAPER], "paper")
    assert [slot.format for slot in plan.layers[0].slots] == ["bf16", "bf16", "int8", "int8", "int8"]
    assert plan.bytes_after <= plan.bytes_before
    assert plan.remarks[-1].startswith("In 1 of 1 layers, more experts are quantized in place than the one of the paper")


def test_paper_serves_smaller_budgets_in_the_order_of_the_scores() -> None:
    wanda = [0.3, 0.8, 0.1, 0.9, 0.2, 0.7, 0.4, 0.6]
    layer = inputs.layer([[8, 1, 1, 1, 1, 1, 1, 1]], {"int8": [0.0] * 8}, wanda=wanda)
    previous: set[int] = set()
    for memory in (1.0, 0.9, 0.8, 0.7):
        plan = plan_of([layer], "paper", memory=memory)
        quantized = {slot.expert for slot in plan.layers[0].slots[:8] if slot.format == "int8"}
        assert plan.bytes_after <= allowed(memory, plan.bytes_before)
        assert quantized == set(sorted(range(1, 8), key=lambda expert: -wanda[expert])[: len(quantized)])
        assert quantized > previous
        previous = quantized
    with pytest.raises(UserError, match="policy paper"):
        plan_of([layer], "paper", memory=0.5)


def test_paper_puts_the_copy_on_the_least_busy_other_rank() -> None:
    layer = inputs.layer([[70, 10, 10, 10, 3, 3]], {"int8": [0.0] * 6})
    plan = plan_of([layer], "paper", ranks=3)
    assert [slot.rank for slot in plan.layers[0].slots] == [0, 0, 1, 1, 2, 2, 2]


# eplb


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]),
        ([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]),
    ],
)
def test_eplb_gives_the_published_example(load: list[int], expected: list[int]) -> None:
    assert rebalance(np.array(load, float), 16, 4, 2, 8).tolist() == expected


def test_eplb_stores_full_precision_within_the_memory() -> None:
    calibration = inputs.skewed(experts=16)
    for memory, slots in ((1.0, 16), (1.24, 16), (1.25, 20), (1.5, 24)):
        plan = make_plan(calibration, policy="eplb", memory=memory, ranks=4, target="cuda")
        for layer in plan.layers:
            assert len(layer.slots) == slots
            assert {slot.format for slot in layer.slots} == {"bf16"}
            assert [slot.rank for slot in layer.slots] == [rank for rank in range(4) for _ in range(slots // 4)]
    with pytest.raises(UserError, match="policy eplb takes"):
        make_plan(calibration, policy="eplb", memory=0.9, ranks=4, target="cuda")
    with pytest.raises(UserError, match="policy eplb takes"):
        make_plan(calibration, policy="eplb", memory=1.0, ranks=4, target="cuda", slots=20)


@pytest.mark.parametrize(("experts", "ranks", "memory"), [(16, 7, 1.3), (16, 1, 1.05), (16, 4, 1.2), (6, 5, 1.6), (8, 16, 1.9)])
def test_eplb_says_what_its_first_replica_takes(experts: int, ranks: int, memory: float) -> None:
    calibration = inputs.skewed(experts=experts)
    arguments: dict[str, Any] = {"policy": "eplb", "ranks": ranks, "target": "cuda" if ranks > 1 else "batched"}
    remark = make_plan(calibration, memory=memory, **arguments).remarks[-1]
    needed = (experts // ranks + 1) * ranks
    assert f"--memory {memory:g} has no room for a replica: the next {needed} slots" in remark
    enough = float(remark.rpartition("--memory ")[2].rstrip("."))
    assert len(make_plan(calibration, memory=enough, **arguments).layers[0].slots) == needed
    assert len(make_plan(calibration, memory=enough - 2e-4, **arguments).layers[0].slots) == experts


def test_uneven_ranks_are_told_the_slots_that_fill_them() -> None:
    plan = make_plan(inputs.skewed(experts=16), policy="eplb", memory=1.3, ranks=7, target="cuda")
    assert any("Ranks hold 2 to 3 slots" in remark and "for 21 slots" in remark for remark in plan.remarks)


def test_eplb_never_stands_two_copies_on_one_rank() -> None:
    # Nearly all load is on one expert, of which the published algorithm would make more copies than there are ranks.
    layer = inputs.layer([[1000, 1, 1, 1, 1, 1, 1, 1]], {"int8": [0.0] * 8})
    plan = plan_of([layer], "eplb", memory=2.0, ranks=4, target="cuda")
    pairs = [(slot.expert, slot.rank) for slot in plan.layers[0].slots]
    assert len(set(pairs)) == len(pairs) == 16
    assert inputs.copies(plan.layers[0])[0] == 4


def test_eplb_refuses_what_does_not_divide() -> None:
    calibration = inputs.skewed(experts=16)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"groups": 3}, "16 experts"),
        ({"nodes": 3}, "4 ranks"),
        ({"slots": 18}, "18 slots"),
    ]
    for options, words in wrong:
        with pytest.raises(UserError, match=words):
            make_plan(calibration, policy="eplb", memory=2.0, ranks=4, target="cuda", **options)


# place


def test_place_only_moves() -> None:
    layer = inputs.layer([[8, 7, 2, 1]], {"int8": [0.0] * 4})
    plan = plan_of([layer], "place", ranks=2, target="cuda")
    assert sorted(held(plan.layers[0])) == [(expert, "bf16") for expert in range(4)]
    assert plan.layers[0].predicted.rank_imbalance_before == pytest.approx(15 / 9)
    assert plan.layers[0].predicted.rank_imbalance_after == pytest.approx(1.0)
    assert plan.bytes_after == plan.bytes_before


def test_place_serves_the_worst_text() -> None:
    # On the pooled counts, all four are equal; in each text, two are busy, and they must be on different ranks.
    layer = inputs.layer([[10, 10, 0, 0], [0, 0, 10, 10]], {"int8": [0.0] * 4})
    plan = plan_of([layer], "place", ranks=2, target="cuda", smoothing=0)
    rank = {slot.expert: slot.rank for slot in plan.layers[0].slots}
    assert rank[0] != rank[1]
    assert rank[2] != rank[3]


# uniform, frequency, random


FORMATS = {"int8": [0.01, 0.02, 0.03, 0.04], "int4": [0.1, 0.2, 0.3, 0.4]}


@pytest.mark.parametrize(("memory", "format"), [(1.0, "bf16"), (0.99, "int8"), (0.56, "int8"), (0.53, "int4"), (0.3, "int4")])
def test_uniform_takes_the_largest_format_that_fits(memory: float, format: str) -> None:
    plan = plan_of([inputs.layer([[10, 70, 10, 10]], FORMATS)], "uniform", memory=memory)
    assert held(plan.layers[0]) == [(expert, format) for expert in range(4)]


def test_uniform_in_a_format_of_choice() -> None:
    layer = inputs.layer([[10, 70, 10, 10]], FORMATS)
    assert {format for _, format in held(plan_of([layer], "uniform", format="int4").layers[0])} == {"int4"}
    with pytest.raises(UserError, match=r"layer 3 was not measured in int3, but in bf16, int8, int4; .*int8,int4,int3$"):
        plan_of([layer], "uniform", format="int3", target="cpu")
    with pytest.raises(UserError, match=r"policy uniform takes .* bytes, .* more than --memory 0\.1 allows"):
        plan_of([layer], "uniform", memory=0.1)


def test_frequency_gives_the_busiest_the_most_bits() -> None:
    quiet = inputs.layer([[40, 30, 20, 10]], FORMATS)
    busy = inputs.layer([[970, 10, 10, 10]], FORMATS, place=1)
    plan = plan_of([quiet, busy], "frequency", memory=0.6)
    # A load counts within its layer: expert 0 of the second layer has 97 % of it.
    assert [held(layer) for layer in plan.layers] == [
        [(0, "int8"), (1, "int8"), (2, "int8"), (3, "int8")],
        [(0, "bf16"), (1, "int8"), (2, "int8"), (3, "int8")],
    ]
    assert plan.bytes_after <= 0.6 * plan.bytes_before


def test_an_fp32_checkpoint_takes_the_float_format_that_errs_least() -> None:
    layer = inputs.layer([[4, 3, 2, 1]], {"fp16": [0.5, 0.0, 0.5, 0.0], "bf16": [0.1] * 4, "int8": [0.5] * 4})
    plan = plan_of([layer], "frequency", "fp32", memory=0.5)
    assert {format for _, format in held(plan.layers[0])} == {"bf16"}
    assert {format for _, format in held(plan_of([layer], "uniform", "fp32", memory=0.5).layers[0])} == {"bf16"}


def test_random_depends_on_its_seed_alone() -> None:
    calibration = inputs.skewed(layers=4, experts=16)
    plans = [make_plan(calibration, policy="random", memory=0.6, ranks=1, target="cpu", seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert [held(layer) for layer in plans[0].layers] != [held(layer) for layer in plans[2].layers]
    counts = [sum(format == "bf16" for layer in plan.layers for _, format in held(layer)) for plan in plans]
    assert counts[0] == counts[2]


@pytest.mark.parametrize("policy", ["uniform", "frequency", "random"])
@pytest.mark.parametrize("memory", [0.3, 0.6, 1.0])
def test_optimal_errs_no_more_than_the_policies_that_only_choose_formats(policy: str, memory: float) -> None:
    calibration = inputs.skewed(layers=3, experts=16)
    arguments: dict[str, Any] = {"memory": memory, "ranks": 1, "target": "cpu"}
    ours, theirs = (make_plan(calibration, policy=name, **arguments) for name in ("optimal", policy))
    errors = [sum(layer.predicted.error for layer in plan.layers) for plan in (ours, theirs)]
    assert errors[0] <= errors[1]


# craft


EVEN, SKEWED = [25, 25, 25, 25], [70, 10, 10, 10]


@pytest.mark.parametrize("ranks", [1, 2])
def test_craft_gives_replicas_to_the_layers_that_gain(ranks: int) -> None:
    layers = [inputs.layer([EVEN], {}), inputs.layer([SKEWED], {}, place=1)]
    plan = plan_of(layers, "craft", memory=1.25, ranks=ranks, target="cuda", smoothing=0)
    assert [len(layer.slots) for layer in plan.layers] == [4, 6]
    assert inputs.copies(plan.layers[1])[0] == 3 if ranks == 1 else inputs.copies(plan.layers[1])[0] == 2
    assert "CRAFT gives layers 0 to 2 replicas, 2 in all." in plan.remarks
    assert {slot.format for layer in plan.layers for slot in layer.slots} == {"bf16"}


def test_craft_stops_where_more_gains_nothing() -> None:
    plan = plan_of([inputs.layer([EVEN], {})], "craft", memory=2.0, target="cuda")
    assert len(plan.layers[0].slots) == 4
    assert "allows no replica that helps" in plan.remarks[-1]


def test_craft_at_memory_one_places_as_well_as_eplb() -> None:
    layer = inputs.layer([[8, 7, 2, 1]], {})
    plan = plan_of([layer], "craft", ranks=2, target="cuda")
    assert plan.layers[0].predicted.rank_imbalance_after == pytest.approx(1.0)
    assert plan.bytes_after == plan.bytes_before


def test_craft_takes_fewer_bytes_than_eplb_for_as_good_a_balance() -> None:
    layers = [inputs.layer([EVEN], {}), inputs.layer([SKEWED], {}, place=1)]
    plans = [plan_of(layers, policy, memory=1.75, target="cuda") for policy in ("craft", "eplb")]
    worst = [max(layer.predicted.lis_after for layer in plan.layers) for plan in plans]
    assert worst[0] <= worst[1]
    assert plans[0].bytes_after < plans[1].bytes_after


# What all have in common


def test_a_plan_says_when_it_balances_nothing() -> None:
    even = inputs.layer([[10, 10, 10, 10]], {"int8": [0.0] * 4})
    assert plan_of([even], "none").remarks[0].startswith("LIS was 1.000 and is 1.000: on batched, this plan does not improve")
    skewed = inputs.layer([[30, 10, 10, 10]], {"int8": [0.0] * 4})
    assert plan_of([skewed], "none").remarks[0].startswith("LIS was 2.000 and is 2.000")
    planned = plan_of([skewed], "optimal")
    assert planned.remarks[0].startswith("LIS falls from 2.000 to 1.000, 100.0 % of the excess")
    predicted = planned.layers[0].predicted
    rows = predicted.padded_work_before, predicted.padded_work_after, predicted.strict_lis_before, predicted.strict_lis_after
    before, after, one_before, one_after = (f"{value:.2f}" for value in rows)
    assert f"computes {before} rows per useful row without this plan and {after} with it" in planned.remarks[1]
    assert f"with lanes of one width it would be {one_before} and {one_after}." in planned.remarks[1]
    assert not any("lanes" in remark for remark in plan_of([skewed], "optimal", ranks=2).remarks)


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt-rtx", "batched"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_plan_says_what_another_lowering_loses_of_it(target: str, lowering: str) -> None:
    plan = make_plan(inputs.skewed(), policy="optimal", memory=0.7, ranks=1, target=target)
    lost = lost_with_lowering(plan, lowering, batched=LOWERINGS[lowering].is_batched(), of_ranks=False)
    waits = target in ("batched", "tensorrt-rtx")
    if waits and lowering != "batched":
        replicas = sum(len(layer.slots) for layer in plan.layers) - 64
        assert f"for {target}, but with --lowering {lowering} its {replicas} replicas share the weights" in lost
    elif not waits and lowering == "batched":
        assert "its slots are not balanced" in lost
        assert "plan with --target batched" in lost
    else:
        assert lost == ""


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_ranks_are_lost_on_one_device_and_plans_without_replicas_lose_nothing(lowering: str) -> None:
    kind = LOWERINGS[lowering]
    ranks = make_plan(inputs.skewed(), policy="optimal", memory=1.0, ranks=2, target="batched")
    lost = lost_with_lowering(ranks, lowering, batched=kind.is_batched(), of_ranks=kind.of_ranks)
    on_one_device = f"balances 2 ranks, but --lowering {lowering} puts all slots on one device"
    assert lost == "" if kind.of_ranks else on_one_device in lost
    none = make_plan(inputs.skewed(), policy="none", memory=1.0, ranks=1, target="batched")
    assert lost_with_lowering(none, lowering, batched=kind.is_batched(), of_ranks=False) == ""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_every_policy_is_deterministic_and_round_trips(policy: str, ranks: int) -> None:
    calibration = inputs.skewed(layers=2, experts=8)
    plans = [make_plan(calibration, policy=policy, memory=1.3, ranks=ranks, target="cuda") for _ in range(2)]
    text = plans[0].model_dump_json(indent=1)
    assert text == plans[1].model_dump_json(indent=1)
    assert Plan.model_validate_json(text) == plans[0]
    assert plans[0].policy == policy
    assert inputs.plan_bytes(plans[0]) == plans[0].bytes_after <= 1.3 * plans[0].bytes_before
    for layer in plans[0].layers:
        pairs = [(slot.expert, slot.rank) for slot in layer.slots]
        assert ranks == 1 or len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("policy", POLICIES)
def test_plans_say_which_options_they_used(policy: str) -> None:
    plan = make_plan(inputs.skewed(layers=1), policy=policy, memory=1.0, ranks=1, target="batched", smoothing=2)
    assert plan.options["smoothing"] == 2
    assert plan.options["worst_text"] == 1
    assert plan.options["tokens"] == 0
    with pytest.raises(UserError, match=f"policy {policy} has no option fraction; choose one of smoothing, worst_text, tokens"):
        make_plan(inputs.skewed(layers=1), policy=policy, memory=1.0, ranks=1, target="batched", fraction=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "best"}, "no policy best; choose one of none, paper"),
        ({"target": "tpu"}, "no target tpu; choose one of cpu"),
        ({"ranks": 0}, "0 ranks"),
        ({"memory": float("nan")}, "memory nan"),
        ({"smoothing": -1}, "option smoothing of policy optimal cannot be -1"),
        ({"worst_text": 1.5}, "option worst_text of policy optimal cannot be 1.5"),
        ({"balance": "much"}, "option balance of policy optimal cannot be 'much'"),
        ({"policy": "paper", "in_place": -1}, "option in_place of policy paper cannot be -1"),
        ({"policy": "paper", "format": "fp16"}, "option format of policy paper cannot be 'fp16'"),
        (
            {"formats": "int8,int3", "target": "cpu"},
            "option formats names int3, but the experts were measured in bf16, int8, int4; choose among these, or calibrate "
            "again with --formats int8,int4,int3$",
        ),
        ({"formats": "int8,int3"}, "engines for batched store int3 as int4, so a plan gains nothing by it; choose int4"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    given = {"policy": "optimal", "memory": 1.0, "ranks": 1, "target": "batched", **arguments}
    with pytest.raises(UserError, match=words) as caught:
        make_plan(inputs.skewed(layers=1), **given)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_calibration_without_errors_keeps_the_format_of_the_checkpoint(policy: str) -> None:
    layer = inputs.layer([[9, 3, 1, 1]], {})
    if policy == "paper":
        with pytest.raises(UserError, match="layer 3 was not measured in int8"):
            plan_of([layer], policy, memory=1.5)
        return
    plan = plan_of([layer], policy, memory=1.5)
    assert {slot.format for slot in plan.layers[0].slots} == {"bf16"}
    assert len(plan.layers[0].slots) == (6 if policy in ("eplb", "craft", "optimal") else 4)


def test_batches_show_more_skew_than_the_pooled_counts() -> None:
    batches = [[8, 0, 0, 0], [0, 8, 0, 0], [0, 0, 8, 0], [0, 0, 0, 8]] * 4
    layer = inputs.layer([[32, 32, 32, 32]], {"int8": [0.0] * 4}, batches=batches)
    predicted = plan_of([layer], "none").layers[0].predicted
    assert predicted.lis_before == 1
    assert [(size.sequences, size.batches, size.lis_mean_before) for size in predicted.over_batches] == [
        (8, 16, 4.0),
        (32, 4, 1.0),
        (128, 1, 1.0),
    ]
