"""The command line as a user meets it."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from click.testing import Result

import rq_compile as package
from rq_compile.architectures.load import load_model
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.cli import options
from rq_compile.cli.main import COMMANDS, main
from rq_compile.export.export import Exported
from rq_compile.planning.schema import Policy, Target
from rq_compile.runtime.engine import Engine
from rq_compile.targets.manifest import Lowering

Run = Callable[..., Result]


def python(*arguments: str, **kwargs: object) -> subprocess.Popen:
    """Another Python that finds this package, whether installed or not."""
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parent.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes, **kwargs)


def refused(result: Result, status: int, *words: object) -> None:
    """One sentence on stderr that has all ``words``, nothing on stdout."""
    assert result.exit_code == status, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert str(word) in result.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("olmoe")


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny OLMoE, to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# Help and wrong arguments


def test_choices_are_those_of_the_schemas() -> None:
    assert get_args(Policy) == options.POLICIES
    assert get_args(Target) == options.TARGETS
    assert get_args(Lowering) == options.LOWERINGS


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
        (["nothing"], ["no such command or model directory: nothing", "compile, calibrate, plan"]),
        (["plan"], ["missing argument 'CALIBRATION'", "see rq-compile plan --help"]),
        (["plan", "x.json"], ["missing option '-o'"]),
        (["plan", "x.json", "-o", "y.json", "--memroy", "1"], ["--memroy", "--memory"]),
        (["plan", "x.json", "-o", "y.json", "--memory", "0"], ["'--memory': 0.0 is not in the range"]),
        (["plan", "x.json", "-o", "y.json", "--memory", "much"], ["'--memory': 'much' is not a valid float"]),
        (["plan", "x.json", "-o", "y.json", "--policy", "best"], ["'best'", "'optimal'"]),
        (["plan", "x.json", "-o", "y.json", "--target", "gpu"], ["'gpu'", "'cuda'"]),
        (["plan", "x.json", "-o", "y.json", "--option", "memory"], ["--option memory is not KEY=VALUE"]),
        (["compile", ".", "--plan", "p.json", "-o", "x.plan"], ["TensorRT", "x.onnx"]),
        (["compile", ".", "--plan", "p.json", "-o", "x"], ["x has no extension of an engine", ".onnx"]),
        (["compile", ".", "-o", "x.onnx"], ["--plan FILE", "--text FILE"]),
        (["compile", ".", "--plan", "p.json", "--memory", "1", "-o", "x.onnx"], ["--memory has no effect beside --plan"]),
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


# Files that are not what they should be


def spoil_nothing(model: Path) -> None:
    shutil.rmtree(model)


def spoil_config(model: Path) -> None:
    (model / "config.json").unlink()


def spoil_safetensors(model: Path) -> None:
    (model / "model.safetensors").unlink()


def spoil_shard(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate((model / "model.safetensors").stat().st_size - 100)


def spoil_kind(model: Path) -> None:
    change(model / "config.json", lambda config: config.update(model_type="llama", architectures=["LlamaForCausalLM"]))


def spoil_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def change(file: Path, how: Callable[[dict], None]) -> Path:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_nothing, ["no such directory"]),
        (spoil_config, ["config.json is missing"]),
        (spoil_safetensors, ["no .safetensors files"]),
        (spoil_shard, ["model.safetensors is truncated", "bytes"]),
        (spoil_kind, ["llama", "olmoe", "mixtral", "switch_transformers"]),
        (spoil_tokenizer, ["no tokenizer.json"]),
    ],
)
def test_a_checkpoint_that_cannot_be_calibrated(
    rq_compile: Run, own_model: Path, stages: Path, out: Path, spoil: Callable[[Path], None], words: list[str]
) -> None:
    spoil(own_model)
    refused(rq_compile("calibrate", own_model, "--text", stages / "text.txt", "-o", out / "c.json", "-q"), 2, *words)
    assert names(out) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["is empty"]), (b" \n", ["is empty"]), (b"\xff\xfe", ["is not UTF-8"]), (b"a", ["1 token", "at least 2"])],
)
@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_text_that_cannot_be_run(
    rq_compile: Run, model: Path, stages: Path, out: Path, tmp_path: Path, command: str, content: bytes, words: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    arguments = {
        "calibrate": (model, "-o", out / "c.json"),
        "evaluate": (stages / "model.onnx", "--reference", model),
    }
    refused(rq_compile(command, *arguments[command], "--text", text, "-q"), 2, "text.txt", *words)
    assert names(out) == []


def set_slot(**values: object) -> Callable[[dict], None]:
    return lambda plan: plan["layers"][1]["slots"][2].update(values)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (set_slot(expert=8), ["layer 1 places expert 8", "8 experts (0-7)"]),
        (set_slot(format="int3"), ["layers.1.slots.2.format", "'int8'"]),
        (lambda plan: plan.update(fingerprint="0" * 64), ["was made for olmoe (000000000000)", "calibrate"]),
        (lambda plan: plan.update(schema_version=2), ["schema_version"]),
        (lambda plan: plan["layers"].pop(), ["no layer model.layers.1.mlp.experts"]),
        (lambda plan: plan.pop("layers"), ["layers: Field required"]),
        (lambda plan: plan.update(target="cuda"), ["target cuda"]),
    ],
)
def test_a_plan_that_cannot_be_compiled(
    rq_compile: Run, model: Path, stages: Path, out: Path, tmp_path: Path, how: Callable[[dict], None], words: list[str]
) -> None:
    plan = change(Path(shutil.copy(stages / "plan.json", tmp_path)), how)
    shutil.copy(stages / "calibration.safetensors", tmp_path)
    refused(rq_compile(model, "--plan", plan, "-o", out / "m.onnx", "-q"), 2, *words)
    assert names(out) == []


def test_a_budget_that_cannot_be_met_says_what_would_do(rq_compile: Run, stages: Path, out: Path) -> None:
    result = rq_compile("plan", stages / "calibration.json", "--memory", 0.01, "-o", out / "p.json", "-q")
    refused(result, 1, "--memory 0.01 allows", "give --memory")
    enough = result.stderr.split("give --memory ")[1].split()[0]
    assert names(out) == []
    assert rq_compile("plan", stages / "calibration.json", "--memory", enough, "-o", out / "p.json", "-q").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nothing.json", "-o", "x.json"], ["nothing.json", "No such file"]),
        (["plan", "plan.json", "-o", "x.json"], ["plan.json is a file of kind plan, not a calibration"]),
        (["plan", "text.txt", "-o", "x.json"], ["text.txt is not a valid calibration"]),
        (["calibrate", ".", "--text", "text.txt", "-o", "x.safetensors"], ["x.safetensors", "end it in .json"]),
        (["inspect", "text.txt"], ["text.txt is no file of rq-compile"]),
        (["inspect", "nothing.onnx"], ["no such engine: nothing.onnx"]),
        (["inspect", "plan.json", "--verify"], ["--verify checks an engine", "leave --verify out"]),
        (["generate", "plan.json", "--prompt", "a"], ["plan.json is not an engine", ".onnx"]),
        (["generate", "model.onnx", "--prompt", ""], ["the prompt is empty"]),
        (["bench", "model.onnx", "--against", "nothing"], ["no such directory: nothing"]),
        (["evaluate", "model.onnx", "--reference", "."], ["no text to run"]),
        (["compile", ".", "--plan", "plan.json", "-o", "plan.onnx"], ["overwrite plan.json, which is a plan"]),
    ],
)
def test_files_of_the_wrong_kind(
    rq_compile: Run, stages: Path, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stages)
    before = names(stages)
    refused(rq_compile(*arguments, "-q"), 2, *words)
    assert names(stages) == before


def test_a_plan_for_another_model(rq_compile: Run, tiny_checkpoint: Callable[[str], Path], stages: Path, out: Path) -> None:
    other = tiny_checkpoint("mixtral")
    refused(rq_compile(other, "--plan", stages / "plan.json", "-o", out / "m.onnx", "-q"), 2, "was made for olmoe", "mixtral")
    arguments = (stages / "model.onnx", "--reference", other, "--text", stages / "text.txt")
    refused(rq_compile("evaluate", *arguments, "-q"), 2, "was made for olmoe", "mixtral")
    assert names(out) == []


# Outputs


def writing(command: str, model: Path, stages: Path, folder: Path) -> list[object]:
    """The arguments with which a command writes into ``folder``."""
    return {
        "calibrate": ["calibrate", model, "--text", stages / "text.txt", "-o", folder / "model.json"],
        "plan": ["plan", stages / "calibration.json", "-o", folder / "model.json"],
        "compile": [model, "--plan", stages / "plan.json", "-o", folder / "model.onnx"],
    }[command]


@pytest.mark.parametrize("command", ["calibrate", "plan", "compile"])
def test_an_output_that_cannot_be_written(rq_compile: Run, model: Path, stages: Path, out: Path, command: str) -> None:
    refused(rq_compile(*writing(command, model, stages, out / "nothing"), "-q"), 2, "cannot write", "there is no folder")
    refused(rq_compile(*writing(command, model, stages, Path("/proc")), "-q"), 2, "cannot write /proc/model")
    (out / "model.json").mkdir()
    (out / "model.onnx").mkdir()
    refused(rq_compile(*writing(command, model, stages, out), "-q"), 2, "cannot write", "is a folder")
    assert names(out) == ["model.json", "model.onnx"]


@contextmanager
def file_size_limited(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing fails as on a full disk, with another errno.

    Around the command alone: pytest's own output may be a file, too.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["calibrate", "plan", "compile"])
def test_a_full_disk_leaves_nothing(rq_compile: Run, model: Path, stages: Path, out: Path, command: str) -> None:
    with file_size_limited(1000):
        result = rq_compile(*writing(command, model, stages, out), "-q")
    refused(result, 1, "File too large", "free space")
    assert names(out) == []


def test_a_full_disk_keeps_what_was_there(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    for file in stages.glob("model.*"):
        shutil.copy(file, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with file_size_limited((stages / "model.onnx.data").stat().st_size - 1):
        result = rq_compile(*writing("compile", model, stages, out), "-q")
    refused(result, 1, "cannot write", "model.onnx.data")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_compilation_leaves_nothing(
    model: Path,
    stages: Path,
    out: Path,
    tmp_path: Path,
    export_once: Callable[[Checkpoint], Exported],
    sent: signal.Signals,
    status: int,
) -> None:
    """It is interrupted when half of the weights are written."""
    (tmp_path / "exported").write_bytes(pickle.dumps(export_once(Checkpoint.open(model))))
    # Who runs the tests in the background may have given them an ignored SIGINT, which Python would then leave ignored.
    program = f"""
import pickle, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import rq_compile.targets.onnxruntime as target
target.export_graph = lambda _: pickle.load(open({str(tmp_path / "exported")!r}, "rb"))
def write_half(weights, file, progress):
    file.write(bytes(1000))
    file.flush()
    print("half", flush=True)
    time.sleep(60)
target.write_weights = write_half
from rq_compile.cli.main import main
main({[str(argument) for argument in writing("compile", model, stages, out)]!r})
"""
    process = python("-c", program)
    assert process.stdout.readline() == "half\n", process.stderr.read()
    assert len(names(out)) == 4
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in stderr
    assert names(out) == []


def test_another_process_writes_the_same_bytes(model: Path, stages: Path, out: Path) -> None:
    calibrate = ("calibrate", model, "--text", stages / "text.txt", "--sequence-length", 64, "-o", out / "calibration.json")
    plan = ("plan", out / "calibration.json", "--target", "batched", "--memory", 0.6, "-o", out / "plan.json")
    commands = [[*map(str, arguments)] for arguments in (calibrate, plan, writing("compile", model, stages, out))]
    # As many threads as conftest gives this process: sums in another order differ in their last bits.
    program = f"""
import torch
torch.set_num_threads(1)
from rq_compile.cli.main import main
for arguments in {commands!r}:
    main([*arguments, "-q"], standalone_mode=False)
"""
    process = python("-c", program)
    assert process.communicate() == ("", "")
    assert names(out) == [name for name in names(stages) if name != "text.txt"]
    for file in out.iterdir():
        assert file.read_bytes() == (stages / file.name).read_bytes(), file.name


def test_a_plan_in_another_folder_finds_the_statistics(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    (out / "plans").mkdir()
    plan = out / "plans" / "plan.json"
    assert rq_compile("plan", stages / "calibration.json", "--target", "batched", "-o", plan, "-q").exit_code == 0
    assert rq_compile(model, "--plan", plan, "-o", out / "m.onnx", "-q").exit_code == 0
    moved = Path(shutil.move(plan, out))
    refused(rq_compile(model, "--plan", moved, "-o", out / "m.onnx", "-q"), 2, "calibration.safetensors are missing")


def test_compiling_in_one_go(rq_compile: Run, model: Path, stages: Path, out: Path) -> None:
    arguments = (model, "--text", stages / "text.txt", "--policy", "none", "--lowering", "stock", "-o", out / "m.onnx")
    result = rq_compile(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "any ONNX Runtime" in result.stdout
    assert "policy" in result.stdout
    assert names(out) == ["m.json", "m.onnx", "m.onnx.data", "m.tokenizer.json"]
    assert rq_compile("inspect", out / "m.onnx", "--verify").exit_code == 0


# What is printed


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
    expected = load_model(Checkpoint.open(model)).generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result["tokens"] == [token for token in expected if token != 1]  # the end-of-text token
    assert result["text"] == tokenizer.decode(expected)

    shown: list[str] = []
    generate = Engine.generate

    def watched(*arguments: object) -> Iterator[int]:
        for token in generate(*arguments):
            shown.append(capsys.readouterr().out)
            yield token
        shown.append(capsys.readouterr().out)

    monkeypatch.setattr(Engine, "generate", watched)
    main(["generate", str(engine), "--prompt", prompt, "--max-tokens", "12", "-q"], standalone_mode=False)
    assert shown[0] == prompt
    assert len([piece for piece in shown[1:] if piece]) > 3
    assert "".join(shown) == prompt + result["text"]
