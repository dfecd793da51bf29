"""Policy ``optimal``: its plans are feasible, proved optimal, and no worse than no change or than the paper's plans."""

import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.planning.budget import allowed
from rq_compile.planning.copies import copy_sequence
from rq_compile.planning.costs import CostModel
from rq_compile.planning.demand import demand
from rq_compile.planning.knapsack import choose_formats
from rq_compile.planning.metrics import excess_removed
from rq_compile.planning.placement import copied_anew, imbalance, pack
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import LayerPlan, Optimality, Plan
from rq_compile.quantization.formats import Format

QUANTIZED: tuple[Format, ...] = ("bf16", "int8", "int4")
QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def optimal(calibration: Calibration, **options: Any) -> Plan:
    arguments: dict[str, Any] = {"memory": 1.0, "ranks": 1, "target": "batched", **options}
    return make_plan(calibration, policy="optimal", **arguments)


def optimality(plan: Plan) -> Optimality:
    assert plan.optimality is not None
    return plan.optimality


def predicted(layer: LayerPlan) -> Any:
    """All figures: those that a plan may lack are in the plans of these tests."""
    return layer.predicted


@st.composite
def calibrations(draw: st.DrawFn, most_layers: int = 3, most_experts: int = 6, texts: int = 3) -> Calibration:
    experts, block = draw(st.integers(1, most_experts)), draw(st.sampled_from([128, 32]))
    loads = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    errors = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 0.1)), min_size=experts, max_size=experts)
    count = draw(st.integers(1, texts))
    layers = [
        inputs.layer(
            draw(st.lists(loads, min_size=count, max_size=count)),
            {"int8": draw(errors), "int4": draw(errors)},
            place=place,
            intermediate=draw(st.sampled_from([16, 24, 32])),
            block=block,
        )
        for place in range(draw(st.integers(1, most_layers)))
    ]
    return inputs.calibration(layers)


# Any input


@QUICK
@given(
    calibration=calibrations(),
    memory=st.floats(0.2, 2.5),
    ranks=st.integers(1, 5),
    target=st.sampled_from(["cpu", "cuda", "tensorrt", "tensorrt-rtx", "batched"]),
    mixed=st.booleans(),
)
def test_any_plan_is_feasible_whole_and_proved(
    calibration: Calibration, memory: float, ranks: int, target: str, mixed: bool
) -> None:
    arguments: dict[str, Any] = {"memory": memory, "ranks": ranks, "target": target, "mixed_copies": mixed}
    least, before = (
        sum(layer.geometry.experts * min(inputs.slot_bytes(layer.geometry, f) for f in formats) for layer in calibration.layers)
        for formats in (["bf16", "int8", "int4"], ["bf16"])
    )
    if least > allowed(memory, before):
        with pytest.raises(UserError, match=f"takes {least} bytes, {least - allowed(memory, before)} more than"):
            optimal(calibration, **arguments)
        return
    plan = optimal(calibration, **arguments)
    assert inputs.plan_bytes(plan) == plan.bytes_after <= allowed(memory, plan.bytes_before)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan == optimal(calibration, **arguments)
    assert plan.optimality is not None
    weights: dict[str, Any] = {"hedge": 0.0002, "waits": ranks > 1 or target in ("batched", "tensorrt-rtx")}
    assert optimality(plan).objective == pytest.approx(objective(plan, calibration, **weights), rel=1e-6, abs=1e-8)
    for rival in (rival for rival in rivals(calibration, arguments) if ranks == 1 or fills_ranks(rival, like=plan)):
        assert optimality(plan).bound <= objective(rival, calibration, **weights) + 1e-8
    for layer, counted in zip(plan.layers, calibration.layers, strict=True):
        assert min(inputs.copies(layer)) >= 1
        assert layer.unreached == [expert for expert, load in enumerate(counted.load) if load == 0]
        assert layer.predicted.lis_before == pytest.approx(lis_of([1] * layer.geometry.experts, counted.load))
        assert layer.predicted.lis_after == pytest.approx(lis_of(inputs.copies(layer), counted.load))
        if ranks > 1:
            pairs = [(slot.expert, slot.rank) for slot in layer.slots]
            assert len(set(pairs)) == len(pairs)
            held = np.bincount([slot.rank for slot in layer.slots], minlength=ranks)
            assert held.max() - held.min() <= 1
        if not mixed:
            assert len({(slot.expert, slot.format) for slot in layer.slots}) == layer.geometry.experts
        if ranks == 1 and target in ("cpu", "cuda", "tensorrt"):
            assert len(layer.slots) == layer.geometry.experts


@QUICK
@given(calibration=calibrations(), ranks=st.sampled_from([1, 2, 3]))
def test_never_worse_than_doing_nothing(calibration: Calibration, ranks: int) -> None:
    assume(all(layer.geometry.experts % ranks == 0 for layer in calibration.layers))
    nothing = make_plan(calibration, policy="none", memory=1.0, ranks=ranks, target="batched")
    plan = optimal(calibration, ranks=ranks, hedge=0)
    assert objective(plan, calibration) <= objective(nothing, calibration) + 1e-9


def rivals(calibration: Calibration, arguments: dict) -> Iterator[Plan]:
    """Other plans within the same memory, on as many ranks."""
    given = {name: arguments[name] for name in ("memory", "ranks", "target")}
    for policy in ("none", "paper", "eplb", "place"):
        with suppress(UserError):
            yield make_plan(calibration, policy=policy, **given)
    for options in ({"balance": 0.01}, {"tolerance": 1.0}, {"hedge": 0.1}, {"formats": "int8"}):
        with suppress(UserError):
            yield optimal(calibration, **given, **options)


def fills_ranks(plan: Plan, like: Plan) -> bool:
    """With equal numbers of slots on all ranks in every layer; if that is impossible, without replicas, and then ``like`` has
    none."""
    held = [np.bincount([slot.rank for slot in layer.slots], minlength=plan.ranks) for layer in plan.layers]
    alike = len({tuple(counts) for counts in held}) == 1 and np.ptp(held[0]) == 0
    return alike if evenly_planned(like) else all(len(layer.slots) == layer.geometry.experts for layer in plan.layers)


def evenly_planned(plan: Plan) -> bool:
    return all(len(layer.slots) % plan.ranks == 0 for layer in plan.layers)


def lis_of(copies: list[int], load: list[int]) -> float:
    """By its definition: each expert's tokens go to its slots in turn."""
    rows = [len(range(copy, count, held)) for held, count in zip(copies, load, strict=True) for copy in range(held)]
    return max(1.0, max(rows) * len(load) / sum(load)) if sum(load) else 1.0


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


# Exactness


def brute_force(calibration: Calibration, budget: float, most: int, replicates: bool) -> float:
    """The least objective (without hedge) over all copies up to ``most`` and all formats, one rank."""
    fronts = []
    for layer in calibration.layers:
        load = demand(layer, 1.0).max(axis=0)
        experts = layer.geometry.experts
        size = {format: inputs.slot_bytes(layer.geometry, format) for format in QUANTIZED}
        points: dict[int, float] = {}
        for copies in itertools.product(range(1, most + 1 if replicates else 2), repeat=experts):
            excess = max(0.0, (load / copies).max() - 1.01) if replicates else 0.0
            for formats in itertools.product(size, repeat=experts):
                bytes_ = sum(count * size[format] for count, format in zip(copies, formats, strict=True))
                error = sum(layer.error[f][e] for e, f in enumerate(formats) if f != "bf16")
                points[bytes_] = min(points.get(bytes_, np.inf), excess + error)
        fronts.append(points)
    best = np.inf
    for choice in itertools.product(*(front.items() for front in fronts)):
        if sum(bytes_ for bytes_, _ in choice) <= budget:
            best = min(best, sum(value for _, value in choice))
    return best


@settings(max_examples=25, deadline=None)
@given(
    loads=st.lists(st.lists(st.integers(0, 100), min_size=3, max_size=3), min_size=2, max_size=2),
    errors=st.lists(st.floats(1e-6, 0.2), min_size=12, max_size=12),
    memory=st.floats(0.35, 1.6),
    target=st.sampled_from(["batched", "cpu"]),
)
def test_tiny_plans_are_the_best_there_are(loads: list[list[int]], errors: list[float], memory: float, target: str) -> None:
    by_layer = np.reshape(errors, (2, 2, 3)).tolist()
    layers = [
        inputs.layer([load], {"int8": int8, "int4": int4}, place=place)
        for place, (load, (int8, int4)) in enumerate(zip(loads, by_layer, strict=True))
    ]
    calibration = inputs.calibration(layers)
    plan = optimal(calibration, memory=memory, target=target, hedge=0)
    best = brute_force(calibration, memory * plan.bytes_before, 4, target == "batched")
    assert optimality(plan).objective == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert optimality(plan).gap < 1e-6
    if target == "batched":
        assert objective(plan, calibration) == pytest.approx(best, rel=1e-6, abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    load=st.lists(st.integers(0, 100), min_size=4, max_size=4),
    errors=st.lists(st.floats(1e-6, 0.05), min_size=8, max_size=8),
    memory=st.floats(0.4, 1.6),
)
def test_the_bound_on_ranks_holds(load: list[int], errors: list[float], memory: float) -> None:
    calibration = inputs.calibration([inputs.layer([load], {"int8": errors[:4], "int4": errors[4:]})])
    plan = optimal(calibration, memory=memory, target="cuda", ranks=2, hedge=0)
    best = np.inf
    share = demand(calibration.layers[0], 1.0)[0]
    size = {format: inputs.slot_bytes(calibration.layers[0].geometry, format) for format in QUANTIZED}
    for where in itertools.product([(0,), (1,), (0, 1)], repeat=4):
        rank_load = [sum(share[e] / len(ranks) for e, ranks in enumerate(where) if rank in ranks) for rank in (0, 1)]
        if len({sum(rank in ranks for ranks in where) for rank in (0, 1)}) > 1:
            continue
        for formats in itertools.product(size, repeat=4):
            if sum(len(ranks) * size[f] for ranks, f in zip(where, formats, strict=True)) <= allowed(memory, plan.bytes_before):
                error = sum(calibration.layers[0].error[f][e] for e, f in enumerate(formats) if f != "bf16")
                best = min(best, error + max(0.0, max(rank_load) / 2 - 1.01))
    assert optimality(plan).bound <= best + 1e-9
    assert optimality(plan).objective >= best - 1e-9


@QUICK
@given(
    error=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    size=st.lists(st.lists(st.integers(1, 50), min_size=3, max_size=3), min_size=5, max_size=5),
    budget=st.integers(0, 200),
)
def test_formats_are_within_one_step_of_the_best(error: list, size: list, budget: int) -> None:
    errors, sizes = np.array(error), np.array(size[: len(error)])
    found = choose_formats(errors, sizes, budget)
    items = np.arange(len(errors))
    possible = [f for f in itertools.product(range(3), repeat=len(errors)) if sizes[items, f].sum() <= budget]
    if found is None:
        assert not possible
        return
    best = min(errors[items, f].sum() for f in possible)
    assert sizes[items, found.format].sum() <= budget
    assert found.bound - 1e-9 <= best <= found.error + 1e-9
    assert found.error <= found.bound + np.ptp(errors, axis=1).max() + 1e-9


@QUICK
@given(load=st.lists(st.floats(0.01, 5), min_size=1, max_size=6), goal=st.floats(0.5, 3))
def test_copies_are_the_fewest_for_every_level(load: list[float], goal: float) -> None:
    loads = np.array(load)
    sequence = copy_sequence(loads, goal=goal, gain=np.zeros(len(load)), most_copies=20)
    for level, replicas in zip(*np.unique(sequence.level, return_index=True), strict=True):
        counts = sequence.counts(int(replicas), len(load))
        assert (counts <= np.ceil(loads / level * (1 - 1e-12))).all()
    assert sequence.level[-1] <= goal or max(sequence.counts(len(sequence.expert), len(load))) == 20


@QUICK
@given(
    loads=st.lists(st.lists(st.integers(0, 99), min_size=6, max_size=6), min_size=1, max_size=3),
    copies=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    ranks=st.integers(4, 6),
)
def test_packing_parts_copies_and_fills_ranks_evenly(loads: list[list[int]], copies: list[int], ranks: int) -> None:
    share = np.array(loads, float) + 1
    share /= share.mean(axis=1, keepdims=True)
    holds = pack(share, np.array(copies), ranks)
    anew = copied_anew(share, holds, 1.0)
    assert holds.sum(axis=0).tolist() == copies
    assert np.ptp(holds.sum(axis=1)) <= 1
    assert anew.sum(axis=1).tolist() == holds.sum(axis=1).tolist()
    assert anew.sum(axis=0).min() >= 1
    assert 1 - 1e-9 <= imbalance(share, anew) <= imbalance(share, holds) + 1e-9


# Purpose


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
