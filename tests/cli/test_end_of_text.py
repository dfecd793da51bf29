"""Where a text ends: in the engine, the reference and packages, as in transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import refused
from transformers import AutoModelForCausalLM

from rq_compile.architectures.model import Model
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference

Command = Callable[..., Result]

ENDS: dict[str, tuple[Any, Any]] = {
    # in config.json, in generation_config.json; "absent": the key is missing; None for the second: the file is missing
    "both": (1, {"eos_token_id": 1}),
    "different": (1, {"eos_token_id": 7}),
    "a list": (1, {"eos_token_id": [9, 7]}),
    "null in the second": (1, {"eos_token_id": None}),
    "absent in the second": (1, {}),
    "no second": (5, None),
    "a list and no second": ([5, 6], None),
    "null and no second": (None, None),
    "absent and no second": ("absent", None),
    "beyond the vocabulary": (1, {"eos_token_id": [1, 5000]}),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_text_ends_where_transformers_ends_it(
    name: str, own_model: Path, engine_of: Callable[[Path], Path], rq_compile: Command
) -> None:
    of_config, of_generation = ENDS[name]
    config = json.loads((own_model / "config.json").read_text()) | {"eos_token_id": of_config}
    if of_config == "absent":
        del config["eos_token_id"]
    (own_model / "config.json").write_text(json.dumps(config))
    (own_model / "generation_config.json").unlink()
    if of_generation is not None:
        (own_model / "generation_config.json").write_text(json.dumps(of_generation))

    said = AutoModelForCausalLM.from_pretrained(own_model).generation_config.eos_token_id
    wanted = said if isinstance(said, list) else [] if said is None else [said]
    model = Model.open(own_model)
    assert model.end_of_text == wanted
    assert Reference.load(model).end_of_text == wanted


def test_a_model_without_an_end_is_remarked_on(own_model: Path, engine_of: Callable[[Path], Path], rq_compile: Command) -> None:
    (own_model / "generation_config.json").write_text("{}")
    path = engine_of(own_model)
    assert any("no token ends a text" in remark for remark in json.loads(path.with_suffix(".json").read_text())["remarks"])
    assert "no token ends a text" in rq_compile("inspect", own_model).stdout.replace("\n", " ")
    generated = rq_compile("generate", path, "--prompt", "In", "--max-tokens", 3)
    assert "does not name an end-of-text token" in generated.stderr
    assert "(--max-tokens)" in generated.stderr


@pytest.mark.parametrize("value", ["</s>", True, 1.5, [1, "2"], {"id": 1}])
def test_an_end_that_is_no_number_is_refused(value: Any, own_model: Path, stages: Path, rq_compile: Command, out: Path) -> None:
    (own_model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    result = rq_compile(own_model, "--plan", stages / "plan.json", "-o", out / "m.onnx", "-q")
    refused(result, 2, "eos_token_id", "not a whole number")


def test_all_stop_at_the_same_token(
    own_model: Path, engine_of: Callable[[Path], Path], rq_compile: Command, tmp_path: Path
) -> None:
    """The second token that the engine would generate is made an end-of-text token."""
    free = list(Reference.load(Model.open(own_model)).generate([9, 30, 41], 9, stop=False))
    (own_model / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, free[4]]}))
    wanted = free[: free.index(free[4])]
    path = engine_of(own_model)
    engine = Engine.load(path, threads=1)
    free = list(engine.generate([9, 30, 41], 9, stop=False))
    wanted = free[: min(free.index(end) for end in engine.manifest.end_of_text if end in free)]
    assert len(wanted) < 9
    assert list(engine.generate([9, 30, 41], 9)) == wanted
    assert rq_compile("package", path, "--for", "edge", "-o", tmp_path / "edge", "-q").exit_code == 0
    command = [sys.executable, str(tmp_path / "edge" / "generate.py"), "--ids", "9", "30", "41", "--tokens", "9"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(token) for token in said.stdout.split()] == wanted
