"""Policy ``optimal``: what it spends memory on, what it copies, and what it says about it."""

import time
from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest
from optimal_plans import objective, optimal, optimality, predicted

from rq_compile.errors import UserError
from rq_compile.planning.budget import allowed
from rq_compile.planning.costs import CostModel
from rq_compile.planning.metrics import excess_removed
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import Format


@pytest.mark.parametrize("seed", range(3))
def test_memory_as_before_removes_the_imbalance_at_hardly_any_error(seed: int) -> None:
    plan = optimal(inputs.skewed(seed=seed))
    assert excess_removed(inputs.mean_lis(plan, "before"), inputs.mean_lis(plan)) >= 0.97
    assert max(predicted(layer).error for layer in plan.layers) < 4e-3
    assert all(predicted(layer).worst_text_lis_after <= 1.02 for layer in plan.layers)


@pytest.mark.parametrize("memory", [0.5, 0.6, 0.75, 1.25])
@pytest.mark.parametrize("ranks", [1, 4])
def test_other_budgets_work(memory: float, ranks: int) -> None:
    plan = optimal(inputs.skewed(), memory=memory, ranks=ranks)
    assert 0.97 * memory <= plan.bytes_after / plan.bytes_before <= memory
    if memory >= 0.6:
        name = "lis" if ranks == 1 else "rank_imbalance"
        before, after = (
            np.mean([getattr(layer.predicted, f"{name}_{when}") for layer in plan.layers]) for when in ("before", "after")
        )
        assert excess_removed(before, after) >= 0.9


@pytest.mark.parametrize("memory", [0.65, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_beats_the_paper(memory: float, seed: int) -> None:
    calibration = inputs.skewed(seed=seed)
    paper = make_plan(calibration, policy="paper", memory=memory, ranks=1, target="batched")
    plan = optimal(calibration, memory=memory, hedge=0)
    assert inputs.plan_bytes(plan) <= allowed(memory, plan.bytes_before)
    assert objective(plan, calibration) < objective(paper, calibration)
    for ours, theirs in zip(plan.layers, paper.layers, strict=True):
        assert ours.predicted.lis_after <= theirs.predicted.lis_after
        assert predicted(ours).worst_text_lis_after <= predicted(theirs).worst_text_lis_after
    # With the same balance as the paper's plan, its error is also smaller.
    least_balance = max(predicted(layer).worst_text_lis_after for layer in paper.layers)
    alike = optimal(calibration, memory=memory, hedge=0, tolerance=least_balance - 1)
    assert sum(predicted(layer).error for layer in alike.layers) <= sum(predicted(layer).error for layer in paper.layers)


@pytest.mark.parametrize("seed", range(3))
def test_within_the_paper_s_bytes_and_half_its_error_it_is_far_better_balanced(seed: int) -> None:
    calibration = inputs.skewed(seed=seed)
    paper = make_plan(calibration, policy="paper", memory=1.0, ranks=1, target="batched")
    memory, error = paper.bytes_after / paper.bytes_before, np.mean([predicted(layer).error for layer in paper.layers])
    plan = optimal(calibration, memory=memory, max_error=error / 2)
    assert plan.bytes_after <= paper.bytes_after
    assert np.mean([predicted(layer).error for layer in plan.layers]) <= error / 2
    assert inputs.mean_lis(plan) - 1 < 0.7 * (inputs.mean_lis(paper) - 1)


def test_on_one_ragged_device_memory_goes_to_bits() -> None:
    calibration = inputs.skewed()
    whole = optimal(calibration, target="cpu")
    assert all(slot.format == "bf16" for layer in whole.layers for slot in layer.slots)
    assert "this plan changes nothing" in whole.remarks[0]
    half = optimal(calibration, target="cpu", memory=0.6)
    assert all(len(layer.slots) == 16 for layer in half.layers)
    assert optimality(half).gap < 1e-6
    assert "no expert is copied and the memory is spent on bits" in half.remarks[0]
    every_int4 = sum(sum(layer.error["int4"]) for layer in calibration.layers)
    assert sum(predicted(layer).error for layer in half.layers) < every_int4 / 50
    assert predicted(half.layers[0]).token_time_after < 0.8 * predicted(half.layers[0]).token_time_before


def test_the_worst_text_counts_not_the_pooled_one() -> None:
    # On the pooled counts, all are equal. The plan must take each text's busiest expert into account.
    layer = inputs.layer([[100, 20, 20, 20], [20, 100, 100, 100]], {"int8": [1e-6] * 4, "int4": [1e-4] * 4})
    plan = optimal(inputs.calibration([layer]), memory=1.0)
    assert plan.layers[0].predicted.lis_before == pytest.approx(1.0)
    assert plan.layers[0].predicted.worst_text_lis_before == pytest.approx(2.5)
    assert predicted(plan.layers[0]).worst_text_lis_after <= 1.02


def test_a_hedged_plan_serves_text_of_an_unknown_kind_better() -> None:
    one_kind, other_kind = inputs.skewed(texts=1, seed=5), inputs.skewed(texts=1, seed=6)

    def lis_elsewhere(plan: Plan) -> float:
        loads = [np.array(layer.load) for layer in other_kind.layers]
        busiest = [(load / inputs.copies(layer)).max() / load.mean() for load, layer in zip(loads, plan.layers, strict=True)]
        return float(np.mean(np.maximum(1, busiest)))

    assert lis_elsewhere(optimal(one_kind)) < lis_elsewhere(optimal(one_kind, hedge=0)) - 0.1


def test_an_unreached_expert_keeps_one_slot() -> None:
    layer = inputs.layer([[300, 100, 0, 0]], {"int8": [1e-6] * 4, "int4": [1e-4] * 4})
    plan = optimal(inputs.calibration([layer]))
    assert inputs.copies(plan.layers[0])[2:] == [1, 1]
    assert plan.layers[0].unreached == [2, 3]
    assert "No calibration token reached 2 of the 4 experts; each keeps a slot." in plan.remarks


def test_copies_of_one_expert_share_a_format_unless_they_may_differ() -> None:
    calibration = inputs.skewed(layers=2, experts=8)
    differing = 0
    for memory in (0.6, 0.7, 0.8, 0.9, 1.0):
        mixed, alike = (optimal(calibration, memory=memory, mixed_copies=mix) for mix in (True, False))
        assert optimality(mixed).objective <= optimality(alike).objective + 1e-12
        assert not any("differ in format" in remark for remark in alike.remarks)
        differing += any("differ in format" in remark for remark in mixed.remarks)
    assert differing


def test_formats_can_be_restricted() -> None:
    plan = optimal(inputs.skewed(), formats="int8")
    assert {slot.format for layer in plan.layers for slot in layer.slots} == {"int8"}
    with pytest.raises(UserError, match="give --memory"):
        optimal(inputs.skewed(), formats="int8", memory=0.4)


def test_a_smaller_float_format_is_an_alternative_for_the_whole_model() -> None:
    made = [
        inputs.layer([[40, 20, 20, 20]], {"bf16": [1e-7] * 4, "int8": [1e-5] * 4, "int4": [1e-3] * 4}, place=place)
        for place in range(2)
    ]
    plan = optimal(inputs.calibration(made, "fp32"), memory=0.75, hedge=0)
    assert {slot.format for layer in plan.layers for slot in layer.slots} == {"bf16"}
    assert inputs.mean_lis(plan) == 1
    made[0] = inputs.layer([[40, 20, 20, 20]], {"bf16": [np.inf] * 4, "int8": [1e-5] * 4, "int4": [1e-3] * 4})
    plan = optimal(inputs.calibration(made, "fp32"), memory=0.75)
    assert "bf16" not in {slot.format for slot in plan.layers[0].slots}


def test_the_memory_that_an_error_asks_for_is_enough() -> None:
    with pytest.raises(UserError) as caught:
        optimal(inputs.skewed(), memory=0.1)
    assert "more than --memory 0.1 allows" in str(caught.value)
    needed = float(str(caught.value).split("give --memory ")[1].split(" ")[0])
    assert optimal(inputs.skewed(), memory=needed).bytes_after <= needed * optimal(inputs.skewed()).bytes_before


def test_ranks_hold_equal_numbers_of_slots_in_every_layer() -> None:
    plan = optimal(inputs.skewed(experts=16), ranks=4, target="cuda")
    counts = {tuple(np.bincount([slot.rank for slot in layer.slots])) for layer in plan.layers}
    assert len(counts) == 1
    assert len(set(next(iter(counts)))) == 1
    uneven = optimal(inputs.skewed(experts=6), ranks=4, memory=0.3, target="cuda")
    assert any("Ranks hold 1 to 2 slots" in remark for remark in uneven.remarks)


def test_a_large_model_is_planned_in_reasonable_time() -> None:
    calibration = inputs.skewed(layers=64, experts=256, top_k=8, texts=2, hidden=2048, intermediate=768)
    start = time.process_time()
    plan = optimal(calibration, target="cuda", ranks=8)
    seconds = time.process_time() - start
    assert seconds < 120
    assert optimality(plan).gap < 0.2
    assert max(predicted(layer).rank_imbalance_after for layer in plan.layers) < 1.02


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_experts_are_copied_on_ranks_only_if_the_step_is_then_shorter(target: str) -> None:
    """A small batch reads most experts, and copies are more to read; a large one waits for the busiest rank."""
    errors: dict[Format, list[float]] = {"int8": [1e-5] * 8, "int4": [1e-3] * 8}
    layer = inputs.layer([[300, *[100] * 7]], errors, top_k=2, hidden=1024, intermediate=1024)
    given: dict[str, Any] = {"ranks": 2, "memory": 1.5, "target": target}
    small, large = (optimal(inputs.calibration([layer]), tokens=tokens, **given) for tokens in (16, 8192))
    said = "Replicas would not shorten a step of 16 tokens on these ranks"
    assert len(large.layers[0].slots) == 10
    assert len(small.layers[0].slots) == (8 if target == "cpu" else 10)
    assert any(said in remark for remark in small.remarks) == (target == "cpu")
    placed, copied = (step_time(plan, 16) for plan in (small, large))
    assert placed < copied if target == "cpu" else placed == copied


@pytest.mark.parametrize(
    ("hidden", "intermediate", "default"), [(96, 64, "placed"), (160, 192, "placed"), (512, 256, "copied"), (1024, 256, "copied")]
)
def test_copies_that_lengthen_decoding_are_only_made_if_asked_for(hidden: int, intermediate: int, default: str) -> None:
    """Without option tokens, neither a batch of 4096 tokens nor a step of its 16 sequences may get longer than without copies.
    With small experts, a step of 16 tokens pays more for each slot than for its bytes."""
    errors: dict[Format, list[float]] = {"int8": [1e-5] * 8, "int4": [1e-3] * 8}
    texts = [[2, 188, 1, 160, 9, 154, 26, 8], [25, 130, 2, 255, 42, 33, 52, 8]]
    layer = inputs.layer(texts, errors, hidden=hidden, intermediate=intermediate)
    calibration = inputs.calibration([layer]).model_copy(update={"batch_size": 16, "sequence_length": 256})
    given: dict[str, Any] = {"ranks": 2, "target": "cpu"}
    copied, plan = optimal(calibration, tokens=4096, **given), optimal(calibration, **given)
    placed = make_plan(calibration, policy="place", memory=1.0, **given)
    assert len(copied.layers[0].slots) == 16
    assert step_time(copied, 4096) < 0.96 * step_time(placed, 4096)
    for tokens in (4096, 16):
        assert step_time(plan, tokens) <= 1.01 * step_time(placed, tokens), tokens
    said = [remark for remark in plan.remarks if "--option tokens" in remark]
    if default == "copied":
        assert (plan.layers, said) == (copied.layers, [])
    else:
        assert (len(plan.layers[0].slots), len(said)) == (8, 1)
        assert step_time(copied, 16) > 1.01 * step_time(placed, 16)
        assert "With 8 replicas in a layer, a step of 4096 tokens would take 0.9" in said[0]
        assert "but one of 16 tokens 1.0" in said[0]
        assert said[0].endswith("copies none; --option tokens=4096 plans for the large step alone.")


def step_time(plan: Plan, tokens: int) -> float:
    """Predicted seconds on the CPU, with the loads that the plan expects."""
    (layer,) = plan.layers
    loads = np.array([slot.load for slot in layer.slots])
    return CostModel("cpu", plan.ranks).step_time(layer.geometry, layer.slots, loads, tokens, np.zeros(len(loads)))
