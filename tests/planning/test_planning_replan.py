"""Replanning: nothing moves without need, as little as possible moves, and the result is a normal plan."""

from pathlib import Path

import numpy as np
import planning_inputs as inputs
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_compile.calibration.schema import Calibration
from rq_compile.cli.main import main
from rq_compile.errors import UserError
from rq_compile.files import read_document, write_document
from rq_compile.planning.budget import allowed
from rq_compile.planning.demand import demand
from rq_compile.planning.plan import make_plan
from rq_compile.planning.replan import Changes, replan
from rq_compile.planning.schema import LayerPlan, Plan

pytestmark = pytest.mark.quick


def drifted(calibration: Calibration, seed: int) -> Calibration:
    """The same model with every layer's loads shuffled among some of its experts."""
    random = np.random.default_rng(seed)
    layers = []
    for layer in calibration.layers:
        order = np.arange(layer.geometry.experts)
        some = random.choice(order, len(order) // 2, replace=False)
        order[some] = random.permutation(some)
        texts = np.array(layer.text_loads)[:, order]
        layers.append(layer.model_copy(update={"text_loads": texts.tolist(), "load": texts.sum(axis=0).tolist()}))
    return calibration.model_copy(update={"layers": layers})


def check(old: Plan, new: Plan, changes: Changes, memory: float) -> None:
    assert Plan.model_validate_json(new.model_dump_json()) == new
    assert inputs.plan_bytes(new) == new.bytes_after <= allowed(memory, new.bytes_before)
    for before, after, layer in zip(old.layers, new.layers, changes.layers, strict=True):
        assert layer.imbalance_after <= layer.imbalance_before
        changed = {change.slot: change for change in layer.changes}
        for place, slot in enumerate(after.slots):
            if place in changed:
                assert changed[place].now == slot.expert != changed[place].before
                assert changed[place].bytes == inputs.slot_bytes(after.geometry, slot.format)
            else:
                assert (slot.expert, slot.format, slot.rank) == key(before, place)
        # The formats of experts do not change.
        assert {(s.expert, s.format) for s in after.slots} == {(s.expert, s.format) for s in before.slots}
        if new.ranks > 1:
            pairs = [(slot.expert, slot.rank) for slot in after.slots]
            assert len(set(pairs)) == len(pairs)
            assert [slot.rank for slot in after.slots] == [slot.rank for slot in before.slots]


def key(layer: LayerPlan, place: int) -> tuple[int, str, int]:
    slot = layer.slots[place]
    return slot.expert, slot.format, slot.rank


@pytest.mark.parametrize("ranks", [1, 4])
def test_loads_as_before_change_nothing(ranks: int) -> None:
    calibration = inputs.skewed()
    plan = make_plan(calibration, policy="optimal", memory=1.0, ranks=ranks, target="batched")
    new, changes = replan(plan, calibration)
    assert changes.count == 0
    assert [layer.slots for layer in new.layers] == [layer.slots for layer in plan.layers]
    assert "0 of" in new.remarks[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_drift_is_balanced_by_a_few_changes(ranks: int, seed: int) -> None:
    calibration = inputs.skewed(seed=seed)
    plan = make_plan(calibration, policy="optimal", memory=1.0, ranks=ranks, target="batched")
    loads = drifted(calibration, seed)
    new, changes = replan(plan, loads, tolerance=0.05)
    check(plan, new, changes, 1.0)
    assert all(layer.imbalance_after <= 1.05 + 1e-9 for layer in changes.layers)
    assert 0 < changes.count < changes.slots / 3
    assert changes.bytes_moved == sum(change.bytes for layer in changes.layers for change in layer.changes)
    assert "every layer is within 5 % of balance" in new.remarks[0]
    # Planning from scratch moves more.
    anew = make_plan(loads, policy="optimal", memory=1.0, ranks=ranks, target="batched")
    moved = sum(
        len(
            {(s.expert, s.format, s.rank, n) for n, s in enumerate(a.slots)}
            - {(s.expert, s.format, s.rank, n) for n, s in enumerate(b.slots)}
        )
        for a, b in zip(anew.layers, plan.layers, strict=True)
    )
    assert changes.count < moved


@settings(max_examples=40, deadline=None)
@given(
    before=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    after=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    memory=st.floats(0.8, 2.5),
    ranks=st.sampled_from([1, 1, 2]),
    tolerance=st.floats(0, 0.5),
)
def test_any_drift_is_answered_within_the_memory(
    before: list[int], after: list[int], memory: float, ranks: int, tolerance: float
) -> None:
    errors = {"int8": [1e-6] * 4, "int4": [1e-4] * 4}
    old_loads, new_loads = (inputs.calibration([inputs.layer([load], errors)]) for load in (before, after))
    plan = make_plan(old_loads, policy="optimal", memory=memory, ranks=ranks, target="batched")
    new, changes = replan(plan, new_loads, tolerance=tolerance)
    check(plan, new, changes, memory)
    load = demand(new_loads.layers[0], 1.0)[0]
    if ranks == 1 and changes.layers[0].imbalance_after <= 1 + tolerance:
        # An expert that needs more copies for the goal gets them, and nothing else changes.
        missing = np.ceil(load / (1 + tolerance) - 1e-8) - inputs.copies(plan.layers[0])
        assert changes.count == np.maximum(0, missing).sum()


def test_without_room_the_busiest_is_relieved_as_far_as_copies_go() -> None:
    errors = {"int8": [1e-6] * 4, "int4": [1e-4] * 4}
    plan = make_plan(
        inputs.calibration([inputs.layer([[60, 20, 20, 20]], errors)]),
        policy="eplb",
        memory=1.25,
        ranks=1,
        target="batched",
    )
    assert inputs.copies(plan.layers[0]) == [2, 1, 1, 1]
    new, changes = replan(plan, inputs.calibration([inputs.layer([[20, 90, 20, 20]], errors)]))
    assert inputs.copies(new.layers[0]) == [1, 2, 1, 1]
    assert changes.count == 1
    assert "make a new plan" in new.remarks[0]


def test_on_one_ragged_device_nothing_changes() -> None:
    calibration = inputs.skewed()
    plan = make_plan(calibration, policy="optimal", memory=1.0, ranks=1, target="cpu")
    new, changes = replan(plan, drifted(calibration, 1))
    assert changes.count == 0
    assert "cpu does not wait for busy experts" in new.remarks[0]


def test_loads_of_another_model_are_refused() -> None:
    calibration = inputs.skewed(layers=2)
    plan = make_plan(calibration, policy="optimal", memory=1.0, ranks=1, target="batched")
    other = calibration.model_copy(update={"fingerprint": "f" * 64, "model": "other"})
    with pytest.raises(UserError, match=r"the loads are of other \(ffffffffffff\), but the plan is for model"):
        replan(plan, other)
    with pytest.raises(UserError, match="a tolerance of -1"):
        replan(plan, calibration, tolerance=-1)


@pytest.mark.parametrize("blocks", [(128, 32), (32, 128)])
def test_loads_quantized_in_other_blocks_are_refused(blocks: tuple[int, int]) -> None:
    errors = {"int8": [1e-6] * 4, "int4": [1e-4] * 4}
    ours, theirs = (inputs.calibration([inputs.layer([[60, 20, 20, 20]], errors, hidden=128, block=block)]) for block in blocks)
    plan = make_plan(ours, policy="optimal", memory=0.6, ranks=1, target="batched")
    words = f"layer 3 of the loads has block {blocks[1]}, but the plan has {blocks[0]}; calibrate with --block {blocks[0]}"
    with pytest.raises(UserError, match=words):
        replan(plan, theirs)


def test_loads_of_other_experts_quantizer_or_formats_are_refused() -> None:
    calibration = inputs.skewed(layers=1)
    plan = make_plan(calibration, policy="optimal", memory=0.5, ranks=1, target="batched")
    layer = calibration.layers[0]
    for field, value in (("top_k", 4), ("hidden", 128), ("activation", "geglu"), ("bias", True)):
        geometry = layer.geometry.model_copy(update={field: value})
        other = calibration.model_copy(update={"layers": [layer.model_copy(update={"geometry": geometry})]})
        with pytest.raises(UserError, match=f"has {field} {value}, but the plan has .*; calibrate the plan's model"):
            replan(plan, other)
    with pytest.raises(UserError, match="measured with --quantizer gptq, but the plan is for nearest"):
        replan(plan, calibration.model_copy(update={"quantizer": "gptq"}))
    one = layer.model_copy(update={"error": {"int8": layer.error["int8"]}})
    with pytest.raises(
        UserError,
        match="has slots in int4, but the loads were measured in bf16, int8; calibrate with --formats int8,i",
    ):
        replan(plan, calibration.model_copy(update={"layers": [one]}))


@pytest.mark.parametrize("target", ["batched", "cpu"])
def test_a_plan_over_its_own_budget_is_refused(target: str) -> None:
    calibration = inputs.skewed(layers=2)
    plan = make_plan(calibration, policy="optimal", memory=1.0, ranks=1, target=target)
    with pytest.raises(UserError, match=r"takes .* bytes, .* more than --memory 0.9 allows; plan again with --memory") as e:
        replan(plan.model_copy(update={"memory": 0.9}), calibration)
    enough = float(str(e.value).split("with --memory ")[1].split()[0])
    replan(plan.model_copy(update={"memory": enough}), calibration)


# The command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    calibration = inputs.skewed(layers=2, experts=8)
    write_document(calibration, tmp_path / "calibration.json")
    write_document(drifted(calibration, 2), tmp_path / "drifted.json")
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    words = [str(folder / word) if word.endswith(".json") else word for word in arguments]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_plan_replan_and_inspect_from_the_command_line(folder: Path) -> None:
    run(folder, "plan", "calibration.json", "-o", "plan.json", "--target", "batched", "--option", "tolerance=0.02")
    shown = run(folder, "replan", "plan.json", "--loads", "drifted.json", "-o", "new.json", "--tolerance", "0.1")
    assert "Replanned for new loads" in shown
    new = read_document(Plan, folder / "new.json")
    assert new.options["replanned_to"] == 0.1
    assert new.options["tolerance"] == 0.02
    inspected = run(folder, "inspect", "new.json")
    for words in ("Replanned for new loads", "tolerance=0.02", "LIS falls from", "LIS of single batches", "padded work"):
        assert words in " ".join(inspected.split())


def test_changes_as_json(folder: Path) -> None:
    run(folder, "plan", "calibration.json", "-o", "plan.json", "--ranks", "2", "--target", "cuda", "-q")
    text = run(folder, "replan", "plan.json", "--loads", "drifted.json", "-o", "new.json", "--json")
    changes = Changes.model_validate_json(text)
    old, new = (read_document(Plan, folder / name) for name in ("plan.json", "new.json"))
    check(old, new, changes, 1.0)


@pytest.mark.parametrize("target", ["cpu", "batched"])
def test_inspect_says_what_a_plan_brings_and_how_good_it_is(folder: Path, target: str) -> None:
    run(folder, "plan", "calibration.json", "-o", "plan.json", "--target", target, "--memory", "0.7")
    inspected = " ".join(run(folder, "inspect", "plan.json").split())
    assert ("a replica is an alias that saves no time" in inspected) == (target == "cpu")
    assert "above the best within the budget" in inspected
    assert "smoothing=1.0" in inspected
