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


# A chat template in the manner of ChatML. The tiny tokenizer reads it letter by letter.
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}
{{- '<' + message.role + '>' + message.content + '</>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
DRAWN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.95, "eos_token_id": 1}


@pytest.fixture(scope="session")
def chat_engine(
    tiny_checkpoint: Callable[[str], Path],
    model_with_chat: Path,
    stages: Path,
    rq_compile: Command,
    export_once: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The engine of the tiny OLMoE with a chat template, whose answers are drawn; do not write to its folder."""
    exported = export_once(Model.open(tiny_checkpoint("olmoe")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "export_graph", lambda copy: exported)
        return compiled(model_with_chat, stages, rq_compile, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def model_with_chat(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of ``chat_engine``; do not write to it."""
    folder = Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path_factory.mktemp("with-chat") / "model"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(DRAWN))
    return folder


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
    return lambda folder: compiled(folder, stages, rq_compile, tmp_path)


def compiled(folder: Path, stages: Path, rq_compile: Command, place: Path) -> Path:
    """The engine of ``folder``, a copy of the tiny OLMoE, with the plan of ``stages``."""
    path = place / "engine" / "m.onnx"
    path.parent.mkdir()
    plan = json.loads((stages / "plan.json").read_text()) | {"fingerprint": Model.open(folder).fingerprint}
    (place / "plan.json").write_text(json.dumps(plan))
    shutil.copy(stages / "calibration.safetensors", place)
    result = rq_compile(folder, "--plan", place / "plan.json", "-o", path, "-q")
    assert result.exit_code == 0, result.stderr
    return path
