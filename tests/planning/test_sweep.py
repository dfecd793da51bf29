"""Plans for several budgets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planning_inputs as inputs
import pytest
from click.testing import Result
from command_line import names, refused
from hypothesis import given
from hypothesis import strategies as st

from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.files import read_document
from rq_compile.planning.plan import POLICIES, least_engine_bytes, make_plan
from rq_compile.planning.sweep import POINTS, Sweep, make_sweep, point_of

pytestmark = pytest.mark.quick
Command = Callable[..., Result]
FROZEN = Path(__file__).parents[1] / "frozen" / "plans" / "calibration.json"
WHOLE = Path(__file__).parents[1] / "frozen" / "calibration.v2.whole.json"


def calibration(loads: list[int]) -> Calibration:
    errors = {"int8": [1e-5 * load for load in loads], "int4": [1e-3 * load for load in loads]}
    return inputs.calibration([inputs.layer([loads], errors), inputs.layer([loads[::-1]], errors, place=1)])


@given(st.lists(st.integers(1, 500), min_size=4, max_size=8), st.sampled_from(["cpu", "batched"]))
def test_more_memory_is_never_worse_and_every_point_is_the_plan_of_its_budget(loads: list[int], target: str) -> None:
    measured = calibration(loads)
    sweep = make_sweep(measured, policy="optimal", budgets=None, ranks=1, target=target)
    assert len(sweep.points) == POINTS
    for point in sweep.points:
        plan = make_plan(measured, policy="optimal", memory=point.memory, ranks=1, target=target)
        assert point == point_of(plan)
        assert point.bytes <= point.memory * sweep.bytes_before * (1 + 1e-12)
    if target == "cpu":
        errors = [point.error for point in sweep.points]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] == 0


def test_the_least_budget_holds_every_expert_once() -> None:
    sweep = make_sweep(calibration([5, 1, 1, 1]), policy="optimal", budgets=None, ranks=1, target="cpu")
    first = sweep.points[0]
    assert (first.slots, first.replicas) == ({"int4": 8}, 0)
    with pytest.raises(UserError, match=r"any budget up to .*: one slot .* takes \d+ bytes, .*; give larger --budgets"):
        make_sweep(calibration([5, 1, 1, 1]), policy="optimal", budgets=[first.memory - 1e-4], ranks=1, target="cpu")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("target", "ranks"), [("cpu", 1), ("batched", 2)])
def test_every_policy(policy: str, target: str, ranks: int) -> None:
    sweep = make_sweep(calibration([9, 3, 2, 1]), policy=policy, budgets=None, ranks=ranks, target=target)
    budgets = [point.memory for point in sweep.points]
    assert budgets == sorted(set(budgets))
    assert Sweep.model_validate_json(sweep.model_dump_json()) == sweep


def test_budgets_that_cannot_be_met_are_named() -> None:
    sweep = make_sweep(calibration([5, 1, 1, 1]), policy="optimal", budgets=[1, 0.01, 0.6, 0.6, 0.02], ranks=1, target="cpu")
    assert [point.memory for point in sweep.points] == [0.6, 1]
    assert sweep.remarks == ["Policy optimal cannot meet these budgets: 0.01, 0.02."]


def test_times_are_over_those_without_a_plan() -> None:
    sweep = make_sweep(calibration([9, 3, 2, 1]), policy="none", budgets=[1], ranks=1, target="cpu")
    assert (sweep.points[0].step_time, sweep.points[0].token_time) == (1, 1)


@pytest.mark.parametrize(("target", "ranks"), [("cpu", 1), ("cpu", 2), ("cuda", 1)])
def test_budgets_of_engines(target: str, ranks: int) -> None:
    """From the smallest engine to the largest that is asked for. Every point is the plan of its budget, and keeps it."""
    measured = read_document(Calibration, WHOLE)
    how: dict[str, Any] = {"policy": "optimal", "ranks": ranks, "target": target}
    most = make_plan(measured, memory=None, engine_bytes=10**9, **how).predicted_engine_bytes
    assert most
    sweep = make_sweep(measured, engine_bytes=most, **how)
    assert len(sweep.points) == POINTS
    assert sweep.remarks == []
    assert Sweep.model_validate_json(sweep.model_dump_json()) == sweep
    for point in sweep.points:
        assert point.engine_bytes
        assert point.bytes_taken <= point.engine_bytes
    assert sweep.points[5] == point_of(make_plan(measured, memory=None, engine_bytes=sweep.points[5].engine_bytes, **how))
    least = sweep.points[0].engine_bytes
    with pytest.raises(UserError, match=f"the smallest engine takes {least} bytes, 1 more than .* give --engine-bytes {least} "):
        make_plan(measured, memory=None, engine_bytes=(least or 0) - 1, **how)
    assert sweep.points[0].modules.keys() == {"int4"}
    assert sweep.points[-1].modules.keys() == {"stored"}
    errors = [point.error_within for point in sweep.points]
    assert errors[0] > errors[-1] == 0
    if ranks == 1:
        assert errors == sorted(errors, reverse=True)


# On the command line


def test_written_and_inspected(rq_compile: Command, out: Path) -> None:
    result = rq_compile("plan", FROZEN, "--sweep", "--budgets", "1,0.5", "-o", out / "sweep.json", "--json")
    assert result.exit_code == 0, result.stderr
    sweep = read_document(Sweep, out / "sweep.json")
    assert json.loads(result.stdout) == json.loads((out / "sweep.json").read_text())
    assert [point.memory for point in sweep.points] == [0.5, 1]
    shown = rq_compile("inspect", out / "sweep.json").stdout
    assert "one plan for each budget" in shown
    assert all(f"{point.error:.2e}" in shown for point in sweep.points)
    again = rq_compile("plan", FROZEN, "--sweep", "-o", out / "sweep.json", "-q")
    assert again.exit_code == 0, again.stderr
    assert len(read_document(Sweep, out / "sweep.json").points) == POINTS


def test_sizes_of_engines_are_shown_and_inspected(rq_compile: Command, out: Path) -> None:
    measured = read_document(Calibration, WHOLE)
    least = least_engine_bytes(measured, ranks=1, target="cpu", options={})
    budgets = f"{-(-least // 1024)}K,1G,8KiB"
    result = rq_compile("plan", WHOLE, "--sweep", "--budgets", budgets, "-o", out / "sweep.json")
    assert result.exit_code == 0, result.stderr
    sweep = read_document(Sweep, out / "sweep.json")
    assert [point.engine_bytes for point in sweep.points] == [-(-least // 1024) * 1024, 2**30]
    assert "cannot meet these budgets: 8192 bytes." in result.stderr + result.stdout
    none = rq_compile("plan", WHOLE, "--sweep", "--budgets", "8K", "-o", out / "none.json")
    assert none.exit_code == 1
    assert "cannot meet any budget up to 8192 bytes: the smallest engine takes" in none.stderr
    none = rq_compile("plan", WHOLE, "--sweep", "--engine-bytes", "8K", "-o", out / "none.json")
    assert none.exit_code == 2
    assert f"allows; give --engine-bytes {least} or more" in none.stderr
    assert names(out) == ["sweep.json"]
    shown = rq_compile("inspect", out / "sweep.json").stdout
    for point in sweep.points:
        assert f"{point.bytes_taken / 1e6:.2f}" in shown
        assert f"{point.model_error:.2e}" in shown
        assert f"stored:{point.modules.get('stored')}" in shown or f"int4:{point.modules.get('int4')}" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sweep", "--budgets", "8K,0.5"], ["is not a list of numbers or of sizes"]),
        (["--sweep", "--budgets", "0.5,8K"], ["is not a list of numbers or of sizes"]),
        (["--sweep", "--budgets", "1GB"], ["is not a list of numbers or of sizes"]),
        (["--sweep", "--budgets", "1G", "--engine-bytes", "2G"], ["are two ranges; leave one of them out"]),
        (["--sweep", "--budgets", "1G", "--target", "batched"], ["--engine-bytes is for --target cpu, cuda, not for batched"]),
        (["--sweep", "--budgets", "1G", "--policy", "paper"], ["--engine-bytes is for policy optimal, not for paper"]),
    ],
)
def test_what_a_sweep_of_engines_refuses(rq_compile: Command, out: Path, options: list[str], words: list[str]) -> None:
    refused(rq_compile("plan", WHOLE, *options, "-o", out / "sweep.json"), 2, *words)
    assert names(out) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sweep", "--memory", "0.5"], ["--memory 0.5 has no effect with --sweep", "--budgets"]),
        (["--budgets", "0.5"], ["--budgets 0.5 has no effect without --sweep"]),
        (["--sweep", "--budgets", "0.5,x"], ["--budgets 0.5,x is not a list of numbers or of sizes"]),
        (["--sweep", "--budgets", ""], ["is not a list of numbers"]),
        (["--sweep", "--budgets", "0.5,nan"], ["has nan; give numbers above 0"]),
        (["--sweep", "--budgets", "0"], ["has 0; give numbers above 0"]),
        (["--sweep", "--budgets", "1e4"], ["has 10000; give numbers above 0 and up to 1000"]),
        (["--sweep", "--policy", "paper", "--option", "formats=int8"], ["policy paper has no option formats"]),
    ],
)
def test_what_it_refuses(rq_compile: Command, out: Path, options: list[str], words: list[str]) -> None:
    refused(rq_compile("plan", FROZEN, *options, "-o", out / "sweep.json"), 2, *words)
    assert names(out) == []


def test_a_plan_and_a_sweep_do_not_replace_each_other(rq_compile: Command, out: Path) -> None:
    for first, second in (([], ["--sweep"]), (["--sweep"], [])):
        path = out / "one.json"
        path.unlink(missing_ok=True)
        assert rq_compile("plan", FROZEN, *first, "-o", path, "-q").exit_code == 0
        before = path.read_bytes()
        refused(rq_compile("plan", FROZEN, *second, "-o", path), 2, "would overwrite", "choose another output with -o")
        assert path.read_bytes() == before


def test_a_sweep_is_no_plan(rq_compile: Command, out: Path, model: Path) -> None:
    assert rq_compile("plan", FROZEN, "--sweep", "-o", out / "sweep.json", "-q").exit_code == 0
    result = rq_compile(model, "--plan", out / "sweep.json", "-o", out / "m.onnx")
    refused(result, 2, "is a file of kind sweep, not a plan; give a plan")
