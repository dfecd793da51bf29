"""The scripts in benchmarks/ run as documented after `make test`: with the installed package, from the root of the sources."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rq_compile

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import moe_layer
import op_profile
import provenance
from machine import KINDS, Machine

from rq_compile.engine.manifest import CacheTensor

ROOT = Path(__file__).parents[2]

# The source tree has no libraries, so it must not come before the installed package.
HELP = """
import runpy, sys
root, *scripts = sys.argv[1:]
for script in scripts:
    sys.argv = [script, "--help"]
    sys.path[0] = root + "/benchmarks"
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    assert root not in sys.path, f"{script} puts the source tree into sys.path"
"""


def scripts() -> list[str]:
    paths = sorted((ROOT / "benchmarks").glob("*.py"))
    with_main = [path for path in paths if "__main__" in path.read_text() and "argparse" in path.read_text()]
    # Only the GPU's benchmarks need Triton.
    return [str(path) for path in with_main if "triton" not in _imported(path)]


def _imported(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_they_take_the_installed_package(tmp_path: Path) -> None:
    (tmp_path / "rq_compile").symlink_to(Path(rq_compile.__file__).parent)
    command = [sys.executable, "-P", "-c", HELP, str(ROOT), *scripts()]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT / "docs", env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage:") == len(scripts()) >= 9


def rows(shape: str, tokens: int, ms: float) -> list[dict]:
    head = {"shape": shape, "format": "int8", "threads": 1, "tokens": tokens, "routing": "uniform"}
    return [head | {"variant": variant, "ms": ms} for variant in ("rq.moe", "QMoE")]


def test_rows_take_the_place_of_those_of_the_same_cell_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "rows.json"
    fast, slow = (Machine(speed, dict.fromkeys(KINDS, speed)) for speed in (2e9, 1e9))
    for processor in ("A", "B"):
        monkeypatch.setattr(moe_layer, "processor", lambda name=processor: name)
        moe_layer.write(output, rows("x", 1, 5.0) + rows("x", 4, 6.0), {1: [slow, fast], 2: []})
    moe_layer.write(output, rows("x", 4, 7.0), {2: [slow]})

    found = json.loads(output.read_text())
    taken = [(row["processor"], row["tokens"], row["ms"]) for row in found["rows"] if row["variant"] == "QMoE"]
    assert taken == [("A", 1, 5.0), ("A", 4, 6.0), ("B", 1, 5.0), ("B", 4, 7.0)]
    assert found["machines"]["A"]["threads"]["1"]["gbytes_per_s"] == 2.0
    assert set(found["machines"]["B"]["threads"]) == {"1", "2"}
    assert all(row["commit"] and row["date"] and row["onnxruntime"] for row in found["rows"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("vendor_id : X\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC, family 25 model 17"),
        ("processor : 0\nmodel name : Some ARM\n", "Some ARM"),
    ],
)
def test_a_processor_has_its_family(text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(provenance, "CPU_INFO", tmp_path / "cpuinfo")
    assert provenance.processor() == name


def test_a_version_that_is_not_installed_is_left_out() -> None:
    assert set(provenance.provenance("numpy", "no-such-package-of-ours")) == {"commit", "date", "numpy"}


def test_a_profile_feeds_caches_of_every_shape() -> None:
    shapes = {"key": ["batch", 2, "past", 8], "state": ["batch", 4, 3], "empty": ["batch", 2, "past", 0]}
    cache = [CacheTensor.model_validate({"past": name, "present": f"{name}.out", "shape": shapes[name]}) for name in shapes]
    manifest: Any = SimpleNamespace(cache=cache, vocabulary=9)
    fed = op_profile._feeds(manifest, tokens=3, past=5)
    assert {name: fed[name].shape for name in shapes} == {"key": (1, 2, 5, 8), "state": (1, 4, 3), "empty": (1, 2, 5, 0)}
    assert fed["attention_mask"].shape == (1, 8)


def test_every_row_says_where_it_comes_from(tmp_path: Path) -> None:
    provenance.write_rows(tmp_path / "rows.json", [{"model": "a"}, {"model": "b"}])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["model"] for row in rows] == ["a", "b"]
    assert all(row["processor"] == provenance.processor() and row["cpus"] >= 1 for row in rows)
    assert all(row[key] for row in rows for key in ("commit", "date", "onnxruntime", "numpy"))


def test_every_benchmark_that_writes_rows_says_where_they_come_from() -> None:
    found = {path.name: path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.py"))}
    writing = [name for name, text in found.items() if '"--output"' in text or "RESULTS = " in text]
    assert len(writing) > 20
    stating = r"provenance(_of)?\(|origin\(|environment\(|write_rows\(|add_rows\("
    assert [name for name in writing if not re.search(stating, found[name])] == []


def test_added_rows_take_the_place_of_those_of_the_same_model(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    for speed, models in enumerate(("ab", "bc")):
        provenance.add_rows(output, [{"model": model, "speed": speed} for model in models], "model")
    rows = json.loads(output.read_text())
    assert [(row["model"], row["speed"]) for row in rows] == [("a", 0), ("b", 1), ("c", 1)]
    assert all(row["commit"] and row["processor"] for row in rows)
