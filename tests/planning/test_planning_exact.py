"""Policy ``optimal``: its plans are feasible, no worse than others, and within their stated bound of the best there are."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from optimal_plans import objective, optimal, optimality

from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.planning.budget import allowed
from rq_compile.planning.copies import copy_sequence
from rq_compile.planning.demand import demand
from rq_compile.planning.knapsack import choose_formats
from rq_compile.planning.placement import copied_anew, imbalance, pack
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import Format

QUANTIZED: tuple[Format, ...] = ("bf16", "int8", "int4")
QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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
