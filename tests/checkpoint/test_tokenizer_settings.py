"""A checkpoint's tokenizer, including unusual ones, in every command that reads text, as in transformers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import text_tokenizers
import tiny
from click.testing import Result
from command_line import refused
from own_engines import change, configure
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from rq_compile.checkpoint.tokenizer import read_tokenizer
from rq_compile.runtime.engine import Engine

Command = Callable[..., Result]
PROMPT = "In the beginning"


def plain(folder: Path) -> None:
    pass


def truncating(folder: Path) -> None:
    change(folder, lambda tokenizer: tokenizer.enable_truncation(8))


def padding(folder: Path) -> None:
    change(folder, lambda tokenizer: tokenizer.enable_padding(length=64, pad_id=2, pad_token="<pad>"))


def both(folder: Path) -> None:
    truncating(folder)
    padding(folder)


def beginning(folder: Path) -> None:
    """Puts a token before a text."""
    processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    change(folder, lambda tokenizer: setattr(tokenizer, "post_processor", processor))


def added_in_the_config(folder: Path) -> None:
    """A token that is only in tokenizer_config.json: it has several letters, and must be matched before they are."""
    token = {"content": "beginning", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    configure(folder, added_tokens_decoder={"99": token | {"special": False}})


def special_in_the_config(folder: Path) -> None:
    token = {"content": "the", "lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
    configure(folder, added_tokens_decoder={"99": token}, mask_token="the")


def added_and_truncating(folder: Path) -> None:
    added_in_the_config(folder)
    both(folder)


SETTINGS = (
    plain, truncating, padding, both, beginning, added_in_the_config, special_in_the_config, added_and_truncating,
)  # fmt: skip


def ids_of(folder: Path, text: str, *, special: bool) -> list[int]:
    """transformers' own."""
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=special).input_ids


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_every_command_reads_text_as_transformers_does(
    setting: Callable[[Path], None],
    own_model: Path,
    stages: Path,
    engine_of: Callable[[Path], Path],
    rq_compile: Command,
    tmp_path: Path,
) -> None:
    setting(own_model)
    text = (stages / "text.txt").read_text()
    content, prompt = ids_of(own_model, text, special=False), ids_of(own_model, PROMPT, special=True)
    long = ["--text", stages / "text.txt", "--sequence-length", 64, "--json"]

    calibrated = rq_compile("calibrate", own_model, *long, "-o", tmp_path / "c.json")
    assert json.loads(calibrated.stdout)["tokens"] == len(content)

    path = engine_of(own_model)
    engine = Engine.load(path, threads=1)
    assert engine.tokenizer.encode(text, add_special_tokens=False).ids == content
    assert engine.tokenizer.encode(PROMPT).ids == prompt

    evaluated = json.loads(rq_compile("evaluate", path, "--reference", own_model, *long).stdout)
    assert evaluated["total"]["tokens"] == len(content) // 64 * 64

    tokens = list(engine.generate(prompt, 5))
    generated = json.loads(rq_compile("generate", path, "--prompt", PROMPT, "--max-tokens", 5, "--json").stdout)
    assert generated["tokens"] == tokens
    assert generated["text"] == AutoTokenizer.from_pretrained(own_model).decode(tokens, skip_special_tokens=True)

    for destination in ("edge", "triton", "onnxruntime-genai"):
        result = rq_compile("package", path, "--for", destination, "-o", tmp_path / destination, "-q")
        assert result.exit_code == 0, result.stderr
    for folder in ("edge/m.tokenizer.json", "triton/m/1/m.tokenizer.json", "onnxruntime-genai/tokenizer.json"):
        packaged = Tokenizer.from_file(str(tmp_path / folder))  # as one reads it who knows nothing of us
        assert packaged.encode(PROMPT).ids == prompt
        assert packaged.encode(text, add_special_tokens=False).ids == content
    for script in ("edge/generate.py", "triton/m/1/generate.py"):
        command = [sys.executable, str(tmp_path / script), *PROMPT.split(), "--tokens", "5"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said.stdout.removesuffix("\n") == generated["text"]


@pytest.mark.parametrize("setting", [both, added_and_truncating], ids=lambda setting: setting.__name__)
def test_the_harness_reads_text_as_transformers_does(
    setting: Callable[[Path], None], own_model: Path, engine_of: Callable[[Path], Path]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from rq_compile.evaluation.harness import EngineLM

    setting(own_model)
    assert EngineLM(engine_of(own_model), threads=1).tok_encode(PROMPT * 5) == ids_of(own_model, PROMPT * 5, special=True)


def test_an_engine_of_before_that_has_them_on(stages: Path, tmp_path: Path) -> None:
    """The file in the engine may ask for truncation, as older releases copied it."""
    for file in stages.glob("model.*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "model.tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    manifest = json.loads((tmp_path / "model.json").read_text())
    manifest["tokenizer"]["bytes"] = path.stat().st_size
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    assert len(Engine.load(tmp_path / "model.onnx", threads=1).tokenizer.encode(PROMPT).ids) == len(PROMPT)


@pytest.mark.parametrize("kind", text_tokenizers.KINDS)
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "OfNoRelease", None])
def test_ids_are_those_of_transformers_whatever_the_class(kind: str, named: str | None, own_model: Path) -> None:
    tokenizer = text_tokenizers.KINDS[kind]()
    tokenizer.enable_truncation(5)
    tokenizer.save(str(own_model / "tokenizer.json"))
    settings: dict[str, Any] = {"added_tokens_decoder": {}, "unk_token": None, "bos_token": "<s>", "extra": 1}
    (own_model / "tokenizer_config.json").write_text(json.dumps(settings | ({"tokenizer_class": named} if named else {})))
    text = "the quick <s> brown näïve fox 🤗"
    try:
        expected = AutoTokenizer.from_pretrained(own_model)(text).input_ids
    except Exception:
        pytest.skip("transformers takes no such pair")
    assert read_tokenizer(own_model).encode(text).ids == expected


def test_code_of_a_checkpoint_is_not_run_for_its_tokenizer(own_model: Path) -> None:
    (own_model / "tokenization_own.py").write_text("raise SystemExit('ran')\n")
    configure(own_model, tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    assert read_tokenizer(own_model).encode("In").ids == tiny.tokenizer()("In").input_ids


def test_settings_that_transformers_refuses_are_told(own_model: Path, rq_compile: Command, stages: Path, out: Path) -> None:
    (own_model / "tokenizer_config.json").write_text("[]")
    result = rq_compile(own_model, "--plan", stages / "plan.json", "-o", out / "m.onnx", "-q")
    refused(result, 2, "tokenizer", str(own_model))
    assert list(out.iterdir()) == []


def test_older_files_alone_are_named_with_a_way_out(own_model: Path, rq_compile: Command, stages: Path, out: Path) -> None:
    (own_model / "tokenizer.json").rename(own_model / "tokenizer.model")
    result = rq_compile("calibrate", own_model, "--text", stages / "text.txt", "-o", out / "c.json", "-q")
    refused(result, 2, "has no tokenizer.json", "save_pretrained", "sentencepiece")
