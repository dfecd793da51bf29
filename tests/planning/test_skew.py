"""The skew of loads and the remarks about it, compared with definitions and computations by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import planning_inputs as inputs
import pytest
from command_line import run_command as run
from scipy.stats import spearmanr

from rq_compile.planning.plan import make_plan
from rq_compile.planning.skew import Skew, outlook, skew, skew_of, steadiness

ERRORS = {"int8": [1e-5] * 4, "int4": [1e-3] * 4}


@pytest.mark.parametrize(
    ("load", "lis", "gini", "tenth"),
    [
        ([5, 5, 5, 5], 1.0, 0.0, 0.25),
        ([0, 0, 0, 8], 4.0, 0.75, 1.0),
        ([1, 3], 1.5, 0.25, 0.75),
        (range(20), 19 / 9.5, 0.35, 37 / 190),
        ([0, 0, 0], 1.0, 0.0, 1 / 3),
    ],
)
def test_figures_by_hand(load: Sequence[int], lis: float, gini: float, tenth: float) -> None:
    found = skew(load)
    np.testing.assert_allclose((found.lis, found.gini, found.busiest_tenth), (lis, gini, tenth))
    assert found.agreement is None


def test_gini_is_half_the_relative_mean_difference() -> None:
    load = np.random.default_rng(0).gamma(0.5, size=61)
    differences = np.abs(load[:, None] - load).mean()
    np.testing.assert_allclose(skew(load).gini, differences / (2 * load.mean()))


@pytest.mark.parametrize(
    ("texts", "agreement"),
    [
        ([[1, 2, 3], [10, 20, 31]], 1.0),
        ([[1, 2, 3], [3, 2, 1]], -1.0),
        ([[1, 2, 3], [1, 2, 3], [3, 2, 1]], (1 - 1 - 1) / 3),
        ([[1, 2, 3], [4, 4, 4]], None),
        ([[1, 2, 3]], None),
    ],
)
def test_agreement_is_by_rank(texts: list[list[int]], agreement: float | None) -> None:
    assert skew([1, 2, 3], texts).agreement == (None if agreement is None else pytest.approx(agreement))


@pytest.mark.parametrize("greatest", [2, 1000], ids=["ties", "hardly any"])
def test_agreement_is_spearmans_correlation(greatest: int) -> None:
    loads = np.random.default_rng(greatest).integers(0, greatest, size=(2, 61))
    assert skew(loads[0], loads).agreement == pytest.approx(spearmanr(*loads).statistic)


def test_halves_of_an_only_text_stand_for_two() -> None:
    layer = inputs.layer([[6, 6, 6]], {"int8": [1e-5] * 3}, batches=[[1, 2, 3], [5, 4, 3]])
    assert skew_of(layer).agreement == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("skews", "words"),
    [
        ([Skew(1.01, 0.01, 0.1, 0.9)], ["cannot help on any target", "is even"]),
        ([Skew(3.0, 0.5, 0.4, 0.9), Skew(1.0, 0.1, 0.2)], ["can help only where", "2.00 times", "30 %", "agree on", "0.90"]),
        ([Skew(3.0, 0.5, 0.4, -0.2)], ["can help only where", "differ in", "-0.20"]),
    ],
)
def test_outlook_is_one_sentence(skews: list[Skew], words: list[str]) -> None:
    said = outlook(skews)
    assert all(word in said for word in words)
    assert ". " not in said
    assert "agree" not in steadiness([replace(one, agreement=None) for one in skews])


@pytest.mark.parametrize(
    ("target", "ranks", "told"),
    [
        ("cpu", 1, "Replication cannot help on cpu with one rank"),
        ("batched", 1, "Replication can help on batched, which waits for the busiest slot"),
        ("cpu", 2, "Replication can help on cpu, which waits for the busiest rank"),
    ],
)
def test_a_plan_says_whether_replication_can_pay(target: str, ranks: int, told: str) -> None:
    calibration = inputs.calibration([inputs.layer([[40, 10, 10, 4], [30, 12, 9, 5]], ERRORS)])
    plan = make_plan(calibration, policy="optimal", memory=1.0, ranks=ranks, target=target)
    (said,) = [remark for remark in plan.remarks if remark.startswith("Replication")]
    assert said.startswith(told)
    assert "rank correlation" in said


def test_inspect_shows_it(tmp_path: Path) -> None:
    calibration = inputs.calibration([inputs.layer([[40, 10, 10, 4], [30, 12, 9, 5]], ERRORS)])
    (tmp_path / "c.json").write_text(calibration.model_dump_json())
    shown = run("inspect", tmp_path / "c.json").stdout
    assert all(word in shown for word in ("Gini", "busiest tenth", "agreement", "outlook", "replication can help"))
