"""The command line as a user sees it: help, wrong arguments, and output."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from command_line import Run, names, python, refused, writing

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.cli import options
from rq_compile.cli.main import COMMANDS, main
from rq_compile.cli.screen import json_value
from rq_compile.engine.manifest import LoweringName
from rq_compile.errors import UserError
from rq_compile.lowerings import LOWERINGS
from rq_compile.planning.schema import Policy
from rq_compile.planning.targets import TARGETS, Target
from rq_compile.quantization.formats import BLOCKS, MEASURABLE_FORMATS, DenseFormat
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.sampling import Choice

pytestmark = pytest.mark.quick


def test_choices_are_those_of_the_schemas() -> None:
    assert get_args(Policy) == options.POLICIES
    assert get_args(Target) == tuple(TARGETS)
    assert get_args(LoweringName) == tuple(LOWERINGS)
    assert get_args(DenseFormat) == options.DENSE_FORMATS
    assert MEASURABLE_FORMATS == options.MEASURABLE_FORMATS
    assert ["auto", *(str(block) for block in BLOCKS)] == list(options.BLOCKS)


def test_help_names_every_command_and_no_line_is_cut(rq_compile: Run) -> None:
    result = rq_compile("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout
        assert rq_compile(command, "--help").stdout.startswith("Usage: ")
    assert "..." not in result.stdout.split("Commands:")[1]


def test_help_and_wrong_arguments_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    commands = [["--help"], ["nothing"], ["plan"], ["compile", ".", "-o", "x.plan"], ["inspect", "nothing.json"]]
    commands += [
        ["calibrate", ".", "--text", "nothing", "-o", "x.json"],
        ["evaluate", "x.onnx", "--reference", ".", "--text", "text"],
    ]
    commands += [[command, "--help"] for command in COMMANDS]
    program = f"""
import sys
from click.testing import CliRunner
from rq_compile.cli.main import main
for arguments in {commands!r}:
    CliRunner().invoke(main, arguments)
print(*sorted(sys.modules.keys() & {{"torch", "transformers", "onnx", "onnxruntime", "numpy", "pydantic", "safetensors"}}))
"""
    stdout, stderr = python("-c", program, cwd=tmp_path).communicate()
    assert stdout == "\n", stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calbrate", "x"], ["calbrate", "did you mean calibrate?"]),
        (["nothing"], ["no such command or model directory: nothing", "compile, calibrate, merge, plan"]),
        (["plan"], ["missing argument 'CALIBRATION[:WEIGHT]...'", "see rq-compile plan --help"]),
        (["plan", "x.json"], ["missing option '-o'"]),
        (["plan", "x.json", "-o", "y.json", "--memroy", "1"], ["--memroy", "--memory"]),
        (["plan", "x.json", "-o", "y.json", "--memory", "0"], ["'--memory': 0.0 is not in the range"]),
        (["plan", "x.json", "-o", "y.json", "--memory", "much"], ["'--memory': 'much' is not a valid float"]),
        (["plan", "x.json", "-o", "y.json", "--policy", "best"], ["'best'", "'optimal'"]),
        (["plan", "x.json", "-o", "y.json", "--target", "gpu"], ["'gpu'", "'cuda'"]),
        (["plan", "x.json", "-o", "y.json", "--option", "memory"], ["--option memory is not KEY=VALUE"]),
        (["compile", ".", "--plan", "p.json", "-o", "x.plan", "--lowering", "stock"], ["--lowering has no effect on x.plan"]),
        (["compile", ".", "--plan", "p.json", "-o", "x"], ["x does not have the extension of an engine", ".onnx"]),
        (["compile", ".", "-o", "x.onnx"], ["--plan FILE", "--text FILE"]),
        (["compile", ".", "--plan", "p.json", "--memory", "1", "-o", "x.onnx"], ["--memory has no effect with --plan"]),
        (["compile", ".", "--plan", "p.json", "--mixed-copies", "-o", "x.onnx"], ["--mixed-copies has no effect with --plan"]),
        (["compile", ".", "--plan", "p.json", "--batch-size", "1", "-o", "x.onnx"], ["--batch-size has no effect with --plan"]),
        (
            ["compile", ".", "--plan", "p.json", "--activation-bits", "8", "--lowering", "batched", "-o", "x.onnx"],
            ["--activation-bits 8 has no effect with --lowering batched"],
        ),
        (
            ["compile", ".", "--plan", "p.json", "--dense-format", "fp32", "--lowering", "stock", "-o", "x.onnx"],
            ["--dense-format has no effect with --lowering stock"],
        ),
        (["generate", "x.onnx", "--prompt"], ["'--prompt' requires an argument"]),
        (["bench", "x.onnx", "--rounds", "0"], ["'--rounds': 0 is not in the range"]),
    ],
)
def test_wrong_arguments(
    rq_compile: Run, arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(rq_compile(*arguments), 2, *words)
    assert names(tmp_path) == []


@pytest.mark.parametrize("lowering", ["native", "stock", "batched"])
def test_compile_says_what_the_lowering_loses_of_the_plan(
    rq_compile: Run, model: Path, stages: Path, out: Path, lowering: str
) -> None:
    arguments = [model, "--plan", stages / "plan.json", "-o", out / "x.onnx", "--lowering", lowering, "--dry-run"]
    said = rq_compile(*arguments)
    assert said.exit_code == 0, said.stderr
    assert ("The plan is for batched, but with --lowering" in said.stderr) == (lowering != "batched")
    assert rq_compile(*arguments, "-q").stderr == ""


def test_a_mistyped_command_in_a_real_process(tmp_path: Path) -> None:
    process = python("-m", "rq_compile.cli.main", "isnpect", "x", cwd=tmp_path)
    stdout, stderr = process.communicate()
    assert process.returncode == 2
    assert stdout == ""
    assert stderr == "error: no such command or model directory: isnpect; did you mean inspect?\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "nan"], ["memory nan", "above 0"]),
        (["--option", "memory=2"], ["policy optimal has no option memory"]),
        (["--option", "mixed_copies=true"], ["give --mixed-copies"]),
        (["--policy", "paper", "--mixed-copies"], ["--mixed-copies has no effect with --policy paper"]),
        (["--option", "balance=much"], ["option balance", "'much'"]),
        (["--policy", "paper", "--option", "balance=1"], ["policy paper has no option balance"]),
    ],
)
def test_planning_options_are_checked_before_the_long_work(
    rq_compile: Run, model: Path, stages: Path, out: Path, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_compile.calibration.calibrate.calibrate", lambda *_, **__: pytest.fail("calibrated"))
    refused(rq_compile(model, "--text", stages / "text.txt", *arguments, "-o", out / "m.onnx", "-q"), 2, *words)
    refused(rq_compile("plan", stages / "calibration.json", *arguments, "-o", out / "p.json", "-q"), 2, *words)
    assert names(out) == []


@pytest.mark.parametrize("given", [[], ["--mixed-copies"]])
def test_mixed_copies_reach_the_planner(
    rq_compile: Run, model: Path, stages: Path, out: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options of ``plan``, and of compiling in one command."""
    seen: list[bool] = []

    def planned(*_: object, **options: Any) -> None:
        seen.append(bool(options.get("mixed_copies", False)))
        raise UserError("planned")

    monkeypatch.setattr("rq_compile.planning.plan.make_plan", planned)
    monkeypatch.setattr("rq_compile.calibration.calibrate.calibrate", lambda *_, **__: (None, {}))
    rq_compile("plan", stages / "calibration.json", *given, "-o", out / "p.json", "-q")
    rq_compile(model, "--text", stages / "text.txt", *given, "-o", out / "m.onnx", "-q")
    assert seen == [bool(given)] * 2


def test_the_block_goes_from_the_calibration_to_the_engine(
    rq_compile: Run, model: Path, stages: Path, out: Path, export_once: object
) -> None:
    text, calibration = out / "short.txt", out / "calibration.json"
    text.write_text((stages / "text.txt").read_text()[:500])
    for arguments in (
        ("calibrate", model, "--text", text, "--block", 32, "--quantizer", "nearest", "-o", calibration),
        ("plan", calibration, "--memory", 0.6, "-o", out / "plan.json"),
        (model, "--plan", out / "plan.json", "-o", out / "model.onnx"),
    ):
        result = rq_compile(*arguments, "-q")
        assert result.exit_code == 0, result.stderr
    manifest = json.loads((out / "model.json").read_text())
    assert {layer["geometry"]["block"] for layer in manifest["plan"]["layers"]} == {32}
    old = json.loads((stages / "plan.json").read_text())
    for layer in old["layers"]:
        del layer["geometry"]["block"]  # as before the block could be chosen
    (out / "old.json").write_text(json.dumps(old))
    shown = json.loads(rq_compile("inspect", out / "old.json", "--json").stdout)
    assert {layer["geometry"]["block"] for layer in shown["layers"]} == {128}


# Output


@pytest.mark.parametrize("command", ["calibrate", "plan", "compile"])
def test_quiet_is_quiet_and_json_is_alone(rq_compile: Run, model: Path, stages: Path, out: Path, command: str) -> None:
    result = rq_compile(*writing(command, model, stages, out), "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    result = rq_compile(*writing(command, model, stages, out), "--json")
    assert json.loads(result.stdout) == json.loads((out / "model.json").read_text())
    assert f"wrote {out / 'model'}" in result.stderr


@pytest.mark.parametrize("file", ["calibration.json", "plan.json", "model.onnx", "model.json"])
@pytest.mark.parametrize("columns", [80, 160])
def test_inspect_shows_every_layer_and_cuts_nothing(
    rq_compile: Run, stages: Path, file: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    result = rq_compile("inspect", stages / file)
    assert result.exit_code == 0
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= columns
    for layer in (0, 1):
        assert any(line.startswith(f"{layer} ") for line in result.stdout.splitlines())
    shown = json.loads(rq_compile("inspect", stages / file, "--json").stdout)
    assert shown == json.loads((stages / file).with_suffix(".json").read_text())


def test_verify_notices_one_bit(rq_compile: Run, stages: Path, out: Path) -> None:
    for file in stages.glob("model.*"):
        shutil.copy(file, out)
    assert rq_compile("inspect", out / "model.onnx", "--verify").exit_code == 0
    for name in ("model.onnx", "model.onnx.data", "model.tokenizer.json"):
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
        refused(rq_compile("inspect", out / "model.onnx", "--verify", "-q"), 1, f"{name} is damaged")
        shutil.copy(stages / name, out)


def test_evaluate_prints_tables_that_agree_with_its_json(rq_compile: Run, model: Path, stages: Path, tmp_path: Path) -> None:
    second = tmp_path / "other.heldout.txt"
    second.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ("evaluate", stages / "model.onnx", "--reference", model, "--text", stages / "text.txt", "--text", second)
    result = json.loads(rq_compile(*arguments, "--sequence-length", 64, "--json").stdout)
    table = rq_compile(*arguments, "--sequence-length", 64, "-q").stdout
    assert [text["name"] for text in result["texts"]] == ["text.txt", "other.heldout.txt"]
    for text in [*result["texts"], result["total"]]:
        assert f"{text['perplexity_engine']:.3f}" in table
        for layer in text["layers"]:
            assert f"{layer['lis_before']:.3f} -> {layer['lis_after']:.3f}" in table
            assert f"{layer['strict_lis_before']:.3f} -> {layer['strict_lis_after']:.3f}" in table


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_null_in_json(
    rq_compile: Run, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    """This holds at any depth of a result; and a report accepts such an evaluation."""
    counted = Engine.counted_logits

    def broken(*arguments: Any, **named: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        logits, rows = counted(*arguments, **named)
        return np.full_like(logits, wrong), rows

    monkeypatch.setattr(Engine, "counted_logits", broken)
    text = out / "text.txt"
    text.write_text("twelve chars" * 5)
    arguments = ["evaluate", stages / "model.onnx", "--reference", model, "--text", text, "--sequence-length", 16, "-q"]
    printed = rq_compile(*arguments, "--json")
    total = json.loads(printed.stdout, parse_constant=refuse_constant)["total"]
    assert (total["perplexity_engine"], total["kl"]) == (None, None)
    assert total["perplexity_reference"] > 1
    assert "not finite" in rq_compile(*arguments).stdout
    (out / "evaluation.json").write_text(printed.stdout)
    report = ["report", stages / "model.onnx", "--evaluation", out / "evaluation.json", "-o", out / "report.html", "--json"]
    headline = json.loads(rq_compile(*report).stdout, parse_constant=refuse_constant)
    assert headline["perplexity_engine"] is None
    assert "not finite" in (out / "report.html").read_text()


def test_every_number_that_json_lacks_is_null() -> None:
    values = {"a": [math.nan, {"b": -math.inf}], "c": math.inf, "d": 1.5, "e": "NaN"}
    assert json_value(values) == {"a": [None, {"b": None}], "c": None, "d": 1.5, "e": "NaN"}


def test_bench_prints_a_ratio(rq_compile: Run, model: Path, stages: Path) -> None:
    arguments = ("bench", stages / "model.onnx", "--against", model, "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1)
    result = json.loads(rq_compile(*arguments, "--json").stdout)
    assert result["ratio_prefill"] == result["engine"]["prefill"] / result["other"]["prefill"]
    assert result["ratio_decode"] == result["engine"]["decode"] / result["other"]["decode"]
    table = rq_compile(*arguments, "-q").stdout.splitlines()
    assert table[-1].split()[0] == "ratio"
    assert len(table[-1].split()) == 3
    alone = rq_compile("bench", stages / "model.onnx", "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1, "-q")
    assert "ratio" not in alone.stdout


def test_generate_streams_what_transformers_would_write(
    rq_compile: Run, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    prompt, engine = "Hello", out / "m.onnx"
    compile = (model, "--text", stages / "text.txt", "--policy", "none", "-o", engine, "-q")
    assert rq_compile(*compile).exit_code == 0
    result = json.loads(rq_compile("generate", engine, "--prompt", prompt, "--max-tokens", 12, "--json").stdout)
    tokenizer = Engine.load(engine).tokenizer
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    reference: Any = load_model(Model.open(model))
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result["tokens"] == [token for token in expected if token != 1]  # the end-of-text token
    assert result["text"] == tokenizer.decode(expected)

    shown: list[str] = []
    choices = Engine.choices

    def watched(*arguments: Any, **named: Any) -> Iterator[Choice]:
        for choice in choices(*arguments, **named):
            shown.append(capsys.readouterr().out)
            yield choice
        shown.append(capsys.readouterr().out)

    monkeypatch.setattr(Engine, "choices", watched)
    main(["generate", str(engine), "--prompt", prompt, "--max-tokens", "12", "-q"], standalone_mode=False)
    assert shown[0] == prompt
    assert len([piece for piece in shown[1:] if piece]) > 3
    assert "".join(shown) == prompt + result["text"]
