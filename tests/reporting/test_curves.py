"""What memory buys: the curves of a sweep in a report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from command_line import names, refused
from html_page import Read
from sweeps import sweep_of

from rq_compile.engine.manifest import Manifest
from rq_compile.files import read_document, write_document
from rq_compile.planning.sweep import point_of
from rq_compile.reporting.curves import curve as drawn_curve
from rq_compile.reporting.curves import curves

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def manifest(stages: Path) -> Manifest:
    return read_document(Manifest, stages / "model.json")


def test_a_sweep_is_drawn_and_the_engine_marked(rq_compile: Command, stages: Path, manifest: Manifest, out: Path) -> None:
    sweep = sweep_of(manifest, stages / "calibration.json")
    write_document(sweep, out / "sweep.json")
    result = rq_compile("report", stages / "model.onnx", "--sweep", out / "sweep.json", "-o", out / "report.html", "-q")
    assert result.exit_code == 0, result.stderr
    content = (out / "report.html").read_text()
    assert "What memory buys" in Read(content).text
    drawn = curves(sweep, manifest.plan)
    assert [curve.title for curve in drawn] == ["Error", "LIS", "Time of a step", "Time of a token"]
    for curve in drawn:
        assert len(curve.marks) == len(sweep.points) + 1
        assert [mark.here for mark in curve.marks].count(True) == 1
        assert all(0 <= place <= 100 for mark in curve.marks for place in (mark.x, mark.y))
        assert all(0 <= place <= 100 for place, _ in [*curve.x_ticks, *curve.y_ticks])
        assert [mark.x for mark in curve.marks] == sorted(mark.x for mark in curve.marks)
        assert all(mark.tip in content for mark in curve.marks)
    # The more memory, the smaller the error and the lower the point.
    heights = [mark.y for mark in drawn[0].marks if not mark.here]
    assert heights[0] < heights[-1]


def test_a_sweep_with_one_budget_is_drawn(manifest: Manifest, stages: Path) -> None:
    sweep = sweep_of(manifest, stages / "calibration.json")
    for point in (sweep.points[0], point_of(manifest.plan)):
        for curve in curves(sweep.model_copy(update={"points": [point]}), manifest.plan):
            assert all(0 <= place <= 100 for mark in curve.marks for place in (mark.x, mark.y))


def test_rounding_puts_no_mark_beyond_the_axes(manifest: Manifest, stages: Path) -> None:
    points = [sweep_of(manifest, stages / "calibration.json").points[place] for place in (0, -1)]
    for least, step in np.random.default_rng(0).random((1000, 2)):
        pair = [point.model_copy(update={"token_time": time}) for point, time in zip(points, (least, least + step), strict=True)]
        drawn = drawn_curve("", "", pair, pair[0], lambda point: point.token_time or 0, "{}")
        assert [mark.y for mark in drawn.marks] == [100, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "0" * 64}, ["is a sweep of the checkpoint 000000000000", "rq-compile plan"]),
        ({"target": "cuda"}, ["is a sweep of the target cuda"]),
        ({"ranks": 2}, ["is a sweep of ranks: 2"]),
    ],
)
def test_sweeps_of_something_else(
    rq_compile: Command,
    stages: Path,
    manifest: Manifest,
    out: Path,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    document = out.parent / "sweep.json"
    write_document(sweep_of(manifest, stages / "calibration.json").model_copy(update=changes), document)
    refused(rq_compile("report", stages / "model.onnx", "--sweep", document, "-o", out / "report.html"), 2, *words)
    assert names(out) == []
