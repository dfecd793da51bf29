"""Every changed document is either accepted, and works in every command that reads it, or rejected with one sentence."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from frozen_files import FROZEN, PLANS
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from rq_compile.evaluation import bench

EXAMPLES = int(os.environ.get("RQ_FUZZ", "40"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
Run = Callable[..., Result]

# New values: within and beyond every bound, of every type.
NUMBERS = [0, 1, -1, 2, 3, 5, 127, 128, 2**14, 2**20, 2**31, 2**53, 2**53 + 1, 2**63, 2**70, -64, 10**400]
OTHERS = [
    None,
    True,
    "",
    "x",
    "8",
    "..",
    "a/b",
    "\x1b[2J",
    "a\nb",
    "\0",
    0.5,
    1.0,
    -0.1,
    1e-300,
    1e15,
    1e300,
    [],
    [0],
    {},
    {"a": 1},
]
SPECIAL = ["NaN", "Infinity", "-Infinity"]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, document: dict[str, Any]) -> str:
    """The text of ``document`` with one to three changes."""
    made = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        # Each depth and name is chosen equally often, since most values are numbers in long lists.
        kinds: dict[tuple, list[tuple]] = {}
        for path in places(made):
            kinds.setdefault(tuple(key if isinstance(key, str) else 0 for key in path), []).append(path)
        if not kinds:
            break
        path = draw(st.sampled_from(draw(st.sampled_from(list(kinds.values())))))
        parent = made
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["number", "number", "other", "special", "drop", "twice", "more", "string"]))
        note(f"{path}: {what}")
        if what == "number":
            parent[path[-1]] = draw(st.sampled_from(NUMBERS))
        elif what == "other":
            parent[path[-1]] = draw(st.sampled_from(OTHERS))
        elif what == "special":
            parent[path[-1]] = float(draw(st.sampled_from(SPECIAL)).replace("Infinity", "inf"))
        elif what == "string":
            parent[path[-1]] = draw(st.text(max_size=5))
        elif what == "drop":
            del parent[path[-1]]
        elif what == "twice" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=3))] = draw(st.sampled_from(NUMBERS))
    return json.dumps(made)


def well_told(result: Result) -> bool:
    """Whether it worked. If not, check that the error is one printable sentence, from a message that was written for this
    error."""
    if result.exit_code == 0:
        return True
    assert result.exit_code in (1, 2), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].isprintable()
    assert "run with --debug" not in lines[0], lines[0]
    return False


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Some words to score.")
    return file


@pytest.fixture(autouse=True)
def without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the pauses between the rounds of a benchmark, since its figures are not used."""
    monkeypatch.setattr(bench, "REST", 0)


def check_all(run: Run, *commands: Sequence[object]) -> None:
    results = [well_told(run(*command, "-q")) for command in commands]
    note(f"worked: {results}")


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@FUZZ
@given(data=st.data())
def test_calibrations(data: st.DataObject, rq_compile: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / "calibration.json"
    file.write_text(data.draw(changed(document(PLANS / "calibration.json"))))
    for policy in ("optimal", "eplb"):
        shutil.copy(PLANS / f"{policy}.batched.2.json", folder / f"{policy}.json")
    check_all(
        rq_compile,
        ["inspect", file],
        ["plan", file, "--target", "batched", "--memory", 0.7, "-o", folder / "a.json"],
        ["plan", file, "--ranks", 2, "--option", "max_error=1e-4", "-o", folder / "b.json"],
        ["plan", file, "--policy", "paper", "-o", folder / "c.json"],
        ["replan", folder / "optimal.json", "--loads", file, "-o", folder / "d.json"],
    )


@FUZZ
@given(data=st.data(), case=st.sampled_from(["optimal.batched.1", "optimal.cuda.2", "eplb.cuda.2", "paper.cpu.1"]))
def test_plans(data: st.DataObject, case: str, rq_compile: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / "plan.json"
    file.write_text(data.draw(changed(document(PLANS / f"{case}.json"))))
    check_all(
        rq_compile,
        ["inspect", file],
        ["replan", file, "--loads", PLANS / "calibration.json", "-o", folder / "a.json"],
        *(["package", file, "--for", server, "-o", folder / server] for server in ("sglang", "tensorrt-llm", "vllm-ascend")),
    )


@FUZZ
@given(data=st.data())
def test_plans_that_are_compiled(
    data: st.DataObject, rq_compile: Run, model: Path, stages: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / "plan.json"
    plan = document(stages / "plan.json")
    shutil.copy(stages / plan["statistics"]["name"], folder)
    file.write_text(data.draw(changed(plan)))
    compile = [model, "--plan", file, "-o", folder / "a.onnx"]
    check_all(rq_compile, [*compile, "--dry-run"], compile)
    if not (folder / "a.onnx").exists():
        left = {path.name for path in folder.iterdir()} - {file.name, plan["statistics"]["name"]}
        assert left == set()
    else:
        check_all(rq_compile, ["generate", folder / "a.onnx", "--prompt", "ab", "--max-tokens", 2])


@FUZZ
@given(data=st.data())
def test_manifests(
    data: st.DataObject, rq_compile: Run, model: Path, stages: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for file in stages.glob("model.*"):
        (folder / file.name).symlink_to(file)
    (folder / "model.json").unlink()
    (folder / "model.json").write_text(data.draw(changed(document(stages / "model.json"))))
    engine = folder / "model.onnx"
    check_all(
        rq_compile,
        ["inspect", engine],
        ["generate", engine, "--prompt", "ab", "--max-tokens", 2],
        ["evaluate", engine, "--reference", model, "--text", short_text, "--sequence-length", 16],
        ["bench", engine, "--prompt-tokens", 3, "--new-tokens", 1, "--rounds", 1],
        ["report", engine, "-o", folder / "report.html"],
        ["package", engine, "--for", "edge", "-o", folder / "edge"],
    )


@FUZZ
@given(data=st.data())
def test_manifests_of_tensorrt(data: st.DataObject, rq_compile: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    manifest = document(FROZEN / "tensorrt-engine.v2.json")
    for file in manifest["files"].values():
        with (folder / file["name"]).open("wb") as made:
            made.truncate(file["bytes"])
    (folder / "trt.json").write_text(data.draw(changed(manifest)))
    check_all(rq_compile, ["inspect", folder / "trt.plan"])


@FUZZ
@given(data=st.data(), which=st.sampled_from(["evaluation", "bench"]))
def test_results(
    data: st.DataObject, which: str, rq_compile: Run, stages: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    manifest = document(stages / "model.json")
    result = document(FROZEN / f"{which}.v1.json")
    if which == "evaluation":
        before = sum(layer["predicted"]["bytes_before"] for layer in manifest["plan"]["layers"])
        result.update(
            reference=manifest["plan"]["model"], expert_bytes_before=before, expert_bytes_after=manifest["expert_bytes"]
        )
    else:
        result["weights_sha256"] = manifest["weights"]["sha256"]
    unchanged = folder / "unchanged.json"
    unchanged.write_text(json.dumps(result))
    report = ["report", stages / "model.onnx", "-o", folder / "report.html", f"--{which}"]
    assert well_told(rq_compile(*report, unchanged, "-q"))
    file = folder / "result.json"
    file.write_text(data.draw(changed(result)))
    check_all(rq_compile, [*report, file])
