"""The command line with input files that are damaged or of the wrong kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, names, refused

pytestmark = pytest.mark.quick


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny OLMoE, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "model"))


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
        (spoil_kind, ["has no tensor", "mlp.down_proj.weight", "config.json"]),
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


def set_slot(**values: Any) -> Callable[[dict], None]:
    return lambda plan: plan["layers"][1]["slots"][2].update(values)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (set_slot(expert=8), ["layer 1 places expert 8", "8 experts (0-7)"]),
        (set_slot(format="int5"), ["layers.1.slots.2.format", "'int8'"]),
        (lambda plan: plan.update(fingerprint="0" * 64), ["was made for olmoe (000000000000)", "calibrate"]),
        (lambda plan: plan.update(schema_version=3), ["schema version 3 is that of a newer rq-compile"]),
        (lambda plan: plan["layers"].pop(), ["no layer model.layers.1.mlp.experts"]),
        (lambda plan: plan.pop("layers"), ["layers is missing", "write it again with rq-compile plan"]),
        (lambda plan: plan.update(target="tensorrt"), ["target tensorrt"]),
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
        (["inspect", "text.txt"], ["text.txt is not a file of rq-compile"]),
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
