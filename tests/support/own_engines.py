"""A copy of the tiny OLMoE, to be changed, and its engine, whose graph is exported once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tokenizers import Tokenizer

from rq_compile.architectures.model import Model
from rq_compile.targets import onnxruntime as target

Command = Callable[..., Result]


def change(folder: Path, edit: Callable[[Tokenizer], object]) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    edit(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


def configure(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny OLMoE, to be changed."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def engine_of(
    model: Path, stages: Path, rq_compile: Command, export_once: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Path]:
    """The engine of a copy of the tiny OLMoE, whose graph is exported once."""
    exported = export_once(Model.open(model))
    monkeypatch.setattr(target, "export_graph", lambda copy: exported)

    def compiled(folder: Path) -> Path:
        path = tmp_path / "engine" / "m.onnx"
        path.parent.mkdir()
        plan = json.loads((stages / "plan.json").read_text()) | {"fingerprint": Model.open(folder).fingerprint}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        shutil.copy(stages / "calibration.safetensors", tmp_path)
        result = rq_compile(folder, "--plan", tmp_path / "plan.json", "-o", path, "-q")
        assert result.exit_code == 0, result.stderr
        return path

    return compiled
