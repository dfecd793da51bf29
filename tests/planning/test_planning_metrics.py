"""The definitions of balance, compared with counting by hand and token by token."""

from dataclasses import replace
from typing import Any

import numpy as np
import planning_inputs as inputs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.evaluation.balance import balance
from rq_compile.planning import metrics
from rq_compile.planning.costs import CostModel
from rq_compile.planning.demand import demand, drift_gain
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Slot
from rq_compile.planning.targets import TARGETS

pytestmark = pytest.mark.quick


def dispatched(tokens: list[int], held: list[int]) -> list[int]:
    """Rows of every slot when each expert's tokens take its slots in turn."""
    rows = [0] * len(held)
    seen: dict[int, int] = {}
    for expert in tokens:
        mine = [slot for slot, of in enumerate(held) if of == expert]
        rows[mine[seen.get(expert, 0) % len(mine)]] += 1
        seen[expert] = seen.get(expert, 0) + 1
    return rows


@given(tokens=st.lists(st.integers(0, 3), max_size=60), extra=st.lists(st.integers(0, 3), max_size=8), seed=st.integers(0, 99))
def test_slot_loads_are_what_dispatch_gives(tokens: list[int], extra: list[int], seed: int) -> None:
    held = np.random.default_rng(seed).permutation([0, 1, 2, 3, *extra]).tolist()
    loads = np.bincount(np.array(tokens, np.int64), minlength=4)
    assert metrics.slot_loads(loads, held).tolist() == dispatched(tokens, held)
    assert metrics.slot_loads(np.stack([loads, 2 * loads]), held)[0].tolist() == dispatched(tokens, held)


def test_lis_by_hand() -> None:
    loads = np.array([60, 20, 10, 10])
    assert metrics.lis(loads, 4) == pytest.approx(60 / 25)
    # Two copies of expert 0: five slots, and the busiest has 30 rows; the share is still computed for four experts.
    slots = metrics.slot_loads(loads, [0, 1, 2, 3, 0])
    assert metrics.lis(slots, 4) == pytest.approx(30 / 25)
    assert metrics.strict_lis(slots) == pytest.approx(30 / 20)
    # Two copies of every expert give no more than 1.
    assert metrics.lis(metrics.slot_loads(np.array([20, 20, 20, 20]), [0, 1, 2, 3] * 2), 4) == 1


def test_padded_work_by_hand() -> None:
    rows = np.array([30, 28, 10, 2])
    assert metrics.padded_work(rows, np.array([0, 0, 0, 0])) == pytest.approx(4 * 30 / 70)
    assert metrics.padded_work(rows, np.array([0, 0, 1, 1])) == pytest.approx((2 * 30 + 2 * 10) / 70)
    assert metrics.padded_work(rows, np.arange(4)) == 1


def test_ranks_by_hand() -> None:
    on_ranks = metrics.rank_loads(np.array([30, 28, 10, 2]), [0, 1, 1, 0], 2)
    assert on_ranks.tolist() == [32, 38]
    assert metrics.rank_imbalance(on_ranks) == pytest.approx(38 / 35)
    assert metrics.balancedness(on_ranks) == pytest.approx(35 / 38)


def test_no_row_is_balanced() -> None:
    nothing = np.zeros((2, 4), np.int64)
    assert metrics.lis(nothing, 4).tolist() == [1, 1]
    assert metrics.strict_lis(nothing).tolist() == [1, 1]
    assert metrics.padded_work(nothing, np.zeros(4)).tolist() == [1, 1]
    assert metrics.rank_imbalance(nothing).tolist() == [1, 1]


def test_batches_add_up_and_the_rest_is_dropped() -> None:
    loads = np.arange(10).reshape(5, 2)
    assert metrics.over_batches(loads, 2).tolist() == [[2, 4], [10, 12]]
    assert metrics.over_batches(loads, 8).shape == (0, 2)


def test_excess_removed() -> None:
    assert metrics.excess_removed(3.0, 1.5) == pytest.approx(0.75)
    assert metrics.excess_removed(2.0, 2.5) == pytest.approx(-0.5)
    assert metrics.excess_removed(1.0, 1.0) == 1


def test_an_evaluation_reports_the_same_lis() -> None:
    calibration = inputs.skewed(layers=2)
    plan = make_plan(calibration, policy="paper", memory=1.0, ranks=1, target="batched")
    rows = {
        layer.name: metrics.slot_loads(np.array(counted.load), [slot.expert for slot in layer.slots])
        for layer, counted in zip(plan.layers, calibration.layers, strict=True)
    }
    for found, layer in zip(balance(plan, rows), plan.layers, strict=True):
        for name in ("lis_before", "lis_after", "strict_lis_before", "strict_lis_after"):
            assert getattr(found, name) == pytest.approx(getattr(layer.predicted, name))


def test_demand_is_relative_to_each_text_and_leaves_empty_texts_out() -> None:
    layer = inputs.layer([[30, 10, 0, 0], [0, 0, 0, 0], [1, 1, 1, 5]], {"int8": [0.0] * 4})
    assert demand(layer, 0).tolist() == [[3, 1, 0, 0], [0.5, 0.5, 0.5, 2.5]]
    smoothed = demand(layer, 1)
    assert smoothed[0] == pytest.approx(np.array([31, 11, 1, 1]) / 11)
    assert demand(inputs.layer([[0, 0]], {"int8": [0.0] * 2}), 0).tolist() == [[1, 1]]


def test_an_unused_expert_gains_little_by_drift() -> None:
    assert drift_gain(np.array([0.0, 0.1, 0.5, 3.8]), 1.0, 4.0).tolist() == pytest.approx([0, 0.4, 1, 0.2])


# Cost models


def slots_of(held: list[tuple[int, str, int]]) -> list[Slot]:
    return [Slot(expert=expert, format=format, rank=rank) for expert, format, rank in held]


def test_on_one_ragged_device_a_replica_is_an_alias_and_bits_are_time() -> None:
    geometry = inputs.layer([[6, 2]], {"int8": [0.0, 0.0]}).geometry
    cost = CostModel("cpu", 1)
    assert cost.busiest == "nothing"
    plain = slots_of([(0, "bf16", 0), (1, "bf16", 0)])
    copied = [*plain, *slots_of([(0, "bf16", 0)])]
    small = slots_of([(0, "int4", 0), (1, "int4", 0)])
    lanes = np.zeros(3)
    alone = cost.step_time(geometry, plain, np.array([6, 2]), 64, lanes)
    assert cost.step_time(geometry, copied, np.array([3, 2, 3]), 64, lanes) == pytest.approx(alone)
    assert cost.step_time(geometry, small, np.array([6, 2]), 64, lanes) < alone


def test_a_batched_lowering_waits_for_its_busiest_slots_and_reads_them_all() -> None:
    geometry = inputs.layer([[6, 2]], {"int8": [0.0, 0.0]}).geometry
    cost = CostModel("batched", 1)
    assert cost.busiest == "slot"
    slots, lanes = slots_of([(0, "int8", 0), (1, "int8", 0)]), np.zeros(2)
    even, uneven = (cost.step_time(geometry, slots, np.array(rows), 100_000, lanes) for rows in ([4, 4], [6, 2]))
    assert uneven / even == pytest.approx(6 / 4, rel=1e-2)
    ragged = CostModel("cpu", 1).step_time(geometry, slots, np.array([8, 0]), 1, lanes)
    batched = cost.step_time(geometry, slots, np.array([8, 0]), 1, np.arange(2))
    assert batched - ragged == pytest.approx(geometry.expert_bytes("int8") / 33e9)


@settings(max_examples=30)
@given(rows=st.lists(st.integers(0, 50), min_size=4, max_size=4))
def test_several_ranks_wait_for_the_busiest(rows: list[int]) -> None:
    geometry = inputs.layer([[1, 1, 1, 1]], {"int8": [0.0] * 4}).geometry
    cost = CostModel("cuda", 2)
    slots = slots_of([(0, "bf16", 0), (1, "bf16", 0), (2, "bf16", 1), (3, "bf16", 1)])
    together = cost.step_time(geometry, slots, np.array(rows), 100, np.zeros(4))
    alone = [cost.step_time(geometry, slots, np.where(np.arange(4) // 2 == rank, rows, 0), 100, np.zeros(4)) for rank in (0, 1)]
    assert cost.busiest == "rank"
    assert together <= max(alone) * (1 + 1e-9) or sum(rows) == 0


def test_the_exchange_costs_bytes_and_messages_where_it_was_measured() -> None:
    """Two ranks with four experts each get rows in the ratio 3 : 1, and share the tokens equally."""
    geometry = ExpertGeometry(experts=2, top_k=1, hidden=64, intermediate=32, activation="swiglu")
    slots = [Slot(expert=expert, format="bf16", rank=expert) for expert in range(2)]
    together_on_one = [slot.model_copy(update={"rank": 0}) for slot in slots]
    rows, tokens, lanes = np.array([3, 1]), 4000, np.zeros(2)
    costs, alone = TARGETS["cpu"], replace(TARGETS["cpu"], message_seconds=0.0, exchanged_per_second=np.inf)
    with pytest.MonkeyPatch.context() as patch:
        together = CostModel("cpu", 2).step_time(geometry, slots, rows, tokens, lanes)
        patch.setitem(TARGETS, "cpu", alone)
        without = CostModel("cpu", 2).step_time(geometry, slots, rows, tokens, lanes)
        on_one = CostModel("cpu", 1).step_time(geometry, together_on_one, rows, tokens, lanes)
    arriving, leaving = 1500, 500  # half of each rank's rows; of its own 2000, 500 are for the other
    assert together - without == pytest.approx(
        3 * costs.message_seconds + (arriving + leaving) * 2 * 64 * 4 / costs.exchanged_per_second
    )
    assert CostModel("cpu", 1).step_time(geometry, together_on_one, rows, tokens, lanes) == on_one
    assert not CostModel("cuda", 2).exchange_known


@pytest.mark.parametrize(("format", "copies"), [("bf16", 1), ("int8", 1), ("int4", 2)])
def test_a_slot_with_rows_costs_a_rank_its_start_and_one_pass_over_its_weights(format: Any, copies: int) -> None:
    """Many tokens reach every slot of the busier of two ranks. One rank alone is predicted without this."""
    geometry = ExpertGeometry(experts=2, top_k=1, hidden=256, intermediate=128, activation="swiglu")
    slots = [Slot(expert=0, format=format, rank=rank) for rank in range(copies)] + [Slot(expert=1, format=format, rank=0)]
    rows, lanes, costs = np.full(len(slots), 5), np.zeros(len(slots)), TARGETS["cpu"]
    on_one = [slot.model_copy(update={"rank": 0}) for slot in slots]
    with pytest.MonkeyPatch.context() as patch:
        together, alone = CostModel("cpu", 2).step_time(geometry, slots, rows, 4000, lanes), CostModel("cpu", 1)
        before = alone.step_time(geometry, on_one, rows, 4000, lanes)
        patch.setitem(TARGETS, "cpu", replace(costs, slot_seconds=0.0, weights_per_second=np.inf))
        without = CostModel("cpu", 2).step_time(geometry, slots, rows, 4000, lanes)
        assert alone.step_time(geometry, on_one, rows, 4000, lanes) == before
    reading, converting = geometry.expert_bytes(format) / costs.bytes_per_second, 3 * 256 * 128 / costs.weights_per_second
    assert together - without == pytest.approx(2 * (costs.slot_seconds + max(0.0, converting - reading)))
    assert (converting > reading) == (format != "bf16")
