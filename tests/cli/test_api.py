"""The Python API: it writes the same files as the commands; the examples of its page run; and it can be installed without the
compiler."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, python

import rq_compile as rq

ROOT = Path(__file__).parents[2]
COMPILER = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnx_graphsurgeon",
    "safetensors",
    "scipy",
    "yaml",
)
WITHOUT_COMPILER = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {COMPILER}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def test_the_stages_write_what_the_commands_write(model: Path, stages: Path, out: Path, capsys: pytest.CaptureFixture) -> None:
    opened, seen = rq.open(model), []
    text = stages / "text.txt"
    rq.calibrate(
        opened, text, out / "calibration.json", sequence_length=64, progress=lambda done, total: seen.append(done / total)
    )
    plan = rq.plan(out / "calibration.json", out / "plan.json", target="batched", memory=0.6)
    manifest = rq.compile(model, out / "plan.json", out / "model.onnx")
    assert manifest.plan == plan
    assert seen == sorted(seen)
    assert seen[-1] == 1
    written = sorted(path.name for path in out.iterdir())
    assert written == sorted(path.name for path in stages.iterdir() if path != text)
    for name in written:
        assert (out / name).read_bytes() == (stages / name).read_bytes(), name
    assert capsys.readouterr() == ("", "")


def test_texts_are_files_or_contents(model: Path, stages: Path, out: Path) -> None:
    text = (stages / "text.txt").read_text()
    made = rq.calibrate(model, {"text.txt": text}, out / "calibration.json", sequence_length=64)
    assert made.texts == rq.calibrate(model, [stages / "text.txt"], out / "calibration.json", sequence_length=64).texts


def test_text_comes_as_the_command_writes_it(stages: Path, rq_compile: Run) -> None:
    prompt = "The hacker"
    said = rq_compile("generate", stages / "model.onnx", "--prompt", prompt, "--max-tokens", 9, "-q").stdout
    assert said == prompt + "".join(rq.load(stages / "model.onnx").stream(prompt, 9)) + "\n"


def test_an_engine_is_evaluated_and_timed(model: Path, stages: Path, rq_compile: Run) -> None:
    engine = rq.load(stages / "model.onnx", threads=1)
    command = ("evaluate", stages / "model.onnx", "--reference", model, "--text", stages / "text.txt", "--sequence-length", 64)
    found = engine.evaluate(model, stages / "text.txt", sequence_length=64)
    assert found.model_dump(mode="json") == json.loads(rq_compile(*command, "--json", "-q", "--threads", 1).stdout)
    speed = engine.bench(stages / "model.onnx", prompt_tokens=4, new_tokens=2, rounds=1)
    assert speed.other is not None
    assert speed.other.name == speed.engine.name == "model.onnx"


def test_mistakes_are_user_errors(stages: Path, out: Path) -> None:
    with pytest.raises(rq.UserError, match="no such"):
        rq.load(out / "missing.onnx")
    with pytest.raises(rq.UserError, match="memory"):
        rq.plan(stages / "calibration.json", out / "plan.json", memory=-1)
    with pytest.raises(AttributeError, match="nonsense"):
        rq.nonsense  # noqa: B018
    assert set(rq.__all__) < set(dir(rq))


def test_outputs_are_guarded_as_on_the_command_line(model: Path, stages: Path, out: Path) -> None:
    calibration = out / "c.json"
    calibration.write_bytes((stages / "calibration.json").read_bytes())
    plan = out / "p.json"
    plan.write_bytes((stages / "plan.json").read_bytes())
    (out / "t.json").write_text("Some text. " * 99)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for attempt, words in (
        (lambda: rq.plan(calibration, calibration), "would overwrite"),
        (lambda: rq.plan(calibration, out / "t.json"), "rq-compile did not write"),
        (lambda: rq.calibrate(model, out / "t.json", out / "t.json"), "rq-compile did not write"),
        (lambda: rq.calibrate(model, {"t": "text"}, plan), "is a plan"),
        (lambda: rq.compile(model, plan, out / "p.onnx"), "p.json, which is a plan"),
        (lambda: rq.compile(model, plan, out / "p.bin"), "end it in .onnx"),
    ):
        with pytest.raises(rq.UserError, match=words):
            attempt()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lowering": "tpu"}, "no lowering tpu; choose one of native, stock"),
        ({"lowering": "stock", "dense_format": "int8"}, "dense_format int8 has no effect with lowering stock"),
        ({"lowering": "batched", "activation_bits": 8}, "activation_bits 8 has no effect with lowering batched"),
        ({"activation_bits": 16}, "activation_bits cannot be 16; choose one of 8, 32"),
        ({"dense_format": "int3"}, "dense_format cannot be int3; choose one of stored"),
    ],
)
def test_no_option_of_a_compilation_is_ignored(options: dict, words: str, model: Path, stages: Path, out: Path) -> None:
    with pytest.raises(rq.UserError, match=words):
        rq.compile(model, stages / "plan.json", out / "e.onnx", **options)
    assert list(out.iterdir()) == []


def test_the_target_of_the_plan_chooses_the_lowering(
    model: Path, stages: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rq.plan(stages / "calibration.json", out / "plan.json", target="cuda", memory=0.6)
    assert rq.compile(model, out / "plan.json", out / "cuda.onnx").lowering == "cuda"
    with caplog.at_level(logging.INFO, "rq_compile"):
        rq.compile(model, stages / "plan.json", out / "native.onnx")
    assert "The plan is for batched, but with --lowering native" in caplog.text


def test_remarks_are_logged(model: Path, stages: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rq_compile"):
        rq.calibrate(model, stages / "text.txt", out / "calibration.json", sequence_length=64)
    assert "fewer than" in caplog.text


def test_the_examples_of_the_documentation(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples" / "text").mkdir(parents=True)
    (tmp_path / "samples" / "olmoe").symlink_to(model)
    for kind in ("calibration", "heldout"):
        text = (ROOT / "samples" / "text" / f"hacker.{kind}.txt").read_text()[:3000]
        (tmp_path / "samples" / "text" / f"hacker.{kind}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, {"__name__": "example"})


def test_running_needs_no_compiler(stages: Path, model: Path) -> None:
    program = (
        WITHOUT_COMPILER
        + f"""
import rq_compile as rq
from rq_compile.cli.main import main

engine = {str(stages / "model.onnx")!r}
loaded = rq.load(engine)
list(loaded.stream("The hacker", 3))
print(loaded.bench(prompt_tokens=4, new_tokens=2, rounds=1).engine.name)
for command, *options in (["inspect"], ["generate", "--prompt", "The", "--max-tokens", "2"], ["bench", "--rounds", "1"]):
    main([command, engine, *options, "-q"], standalone_mode=False)
main(["inspect", {str(model)!r}], standalone_mode=False)
"""
    )
    said, error = python("-c", program).communicate()
    assert said.startswith("model.onnx\n")
    assert error.startswith(
        "error: inspect needs torch, which a plain install does not include; run pip install '.[compile]' in "
    )
    assert error.count("\n") == 1


# State of a process that other code relies on and may have set up. Of torch, only what is already imported.
STATE = """
import logging, os, signal, sys, warnings

class Seen(logging.Handler):
    def emit(self, record):
        if not record.name.startswith("rq_compile"):
            print(record.name, record.getMessage())

def state():
    logs = [logging.root, *map(logging.getLogger, ("torch", "transformers", "rq_compile"))]
    found = {
        "environment": dict(os.environ),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "logging": logging.root.manager.disable,
        "loggers": [(log.level, log.handlers[:], log.propagate, log.disabled) for log in logs],
        "warnings": (warnings.filters[:], warnings.showwarning),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
        "path": sys.path[:],
    }
    if "torch" in sys.modules:
        import torch
        found["torch"] = {
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
            "types": (torch.get_default_dtype(), torch.get_default_device()),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "random numbers": torch.get_rng_state().tolist(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "exporter": torch.onnx.export,
        }
    return found

def unlike(before):
    after = state()
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}
"""


def test_importing_changes_nothing() -> None:
    program = f"""{STATE}
import numpy  # adds filters of its own
before = state()
import rq_compile
rq_compile.Engine
print(unlike(before), {{"torch", "onnx", "onnxruntime"}} & set(sys.modules))
"""
    assert python("-c", program).communicate() == ("{} set()\n", "")


def test_no_stage_changes_the_process(model: Path, stages: Path, out: Path) -> None:
    """And no stage writes to its streams, even if the process shows the warnings that libraries log."""
    program = f"""{STATE}
import torch, transformers, onnxscript
from transformers.exporters import exporter_onnx
torch.set_num_threads(3)
logging.basicConfig(level=logging.INFO, handlers=[Seen(logging.WARNING)])
before = state()
import rq_compile as rq
model, text = rq.open({str(model)!r}), {str(stages / "text.txt")!r}
rq.calibrate(model, text, "c.json", sequence_length=64)
print("calibrate", unlike(before))
rq.plan("c.json", "p.json", memory=0.6)
rq.plan(model, "q.json", memory=0.6)
print("plan", unlike(before))
rq.compile(model, "p.json", "e.onnx")
print("compile", unlike(before))
engine = rq.load("e.onnx")
engine.evaluate(model, text, sequence_length=64)
print("evaluate", unlike(before))
engine.bench({str(model)!r}, prompt_tokens=4, new_tokens=2, rounds=1)
print("bench", unlike(before))
try:
    rq.compile(model, "p.json", "e.onnx", lowering="cuda")
except rq.UserError:
    pass
print("refused", unlike(before))
"""
    said, error = python("-c", program, cwd=out).communicate()
    stages_run = ("calibrate", "plan", "compile", "evaluate", "bench", "refused")
    assert said.splitlines() == [f"{stage} {{}}" for stage in stages_run]
    assert error == ""


def test_logits_are_those_of_the_reference_type(stages: Path) -> None:
    logits = rq.load(stages / "model.onnx").logits(np.array([[1, 2, 3]]))
    assert (logits.shape[:2], logits.dtype) == ((1, 3), np.float32)
