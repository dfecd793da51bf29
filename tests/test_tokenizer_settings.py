"""A checkpoint's tokenizer and end-of-text ids, odd ones among them, in every command that reads text, as in transformers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import text_tokenizers
import tiny
from click.testing import Result
from command_line import refused
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from rq_compile.architectures.model import Model
from rq_compile.checkpoint.tokenizer import read_tokenizer
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets import onnxruntime as target

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
    """A token that only tokenizer_config.json has: of several letters, to be found before them."""
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


def ids_of(folder: Path, text: str, *, special: bool) -> list[int]:
    """transformers' own."""
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=special).input_ids


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
        command = [sys.executable, tmp_path / script, *PROMPT.split(), "--tokens", "5"]
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
    settings = {"added_tokens_decoder": {}, "unk_token": None, "bos_token": "<s>", "extra": 1}
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


# Where a text ends.

ENDS: dict[str, tuple[Any, Any]] = {
    # in config.json, in generation_config.json; "absent" is no key, None of the second no file
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
    assert "no end-of-text token" in generated.stderr
    assert "(--max-tokens)" in generated.stderr


@pytest.mark.parametrize("value", ["</s>", True, 1.5, [1, "2"], {"id": 1}])
def test_an_end_that_is_no_number_is_refused(value: Any, own_model: Path, stages: Path, rq_compile: Command, out: Path) -> None:
    (own_model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    result = rq_compile(own_model, "--plan", stages / "plan.json", "-o", out / "m.onnx", "-q")
    refused(result, 2, "eos_token_id", "not a whole number")


def test_all_stop_at_the_same_token(
    own_model: Path, engine_of: Callable[[Path], Path], rq_compile: Command, tmp_path: Path
) -> None:
    """The second token that the engine would give is made an end of text."""
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
    command = [sys.executable, tmp_path / "edge" / "generate.py", "--ids", "9", "30", "41", "--tokens", "9"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(token) for token in said.stdout.split()] == wanted


# Texts.


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"\xef\xbb\xbf", ["is empty"]),
        (b"text\0more" * 99, ["NUL", "number 4", "text file"]),
        (b"\x7fELF\0\0" * 99, ["NUL"]),
        (b"\xff\xfet\0e\0x\0t\0" * 99, ["not UTF-8"]),
        ("naïve".encode("latin-1") * 99, ["not UTF-8"]),
    ],
)
def test_what_is_no_text_is_refused(
    command: str, content: bytes, words: list[str], model: Path, stages: Path, rq_compile: Command, tmp_path: Path, out: Path
) -> None:
    text = tmp_path / "t.txt"
    text.write_bytes(content)
    given = {
        "calibrate": ["calibrate", model, "--text", text, "-o", out / "c.json"],
        "evaluate": ["evaluate", stages / "model.onnx", "--reference", model, "--text", text],
    }[command]
    refused(rq_compile(*given), 2, "t.txt", *words)


def test_a_byte_order_mark_is_not_text(model: Path, rq_compile: Command, tmp_path: Path) -> None:
    documents = []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "t.txt").write_bytes(mark + b"In the beginning there was text. " * 9)
        result = rq_compile("calibrate", model, "--text", tmp_path / "t.txt", "-o", tmp_path / "c.json", "--json", "-q")
        documents.append(json.loads(result.stdout))
    assert documents[0] == documents[1]


def test_tokens_that_the_model_does_not_know(
    own_model: Path, stages: Path, engine_of: Callable[[Path], Path], rq_compile: Command, tmp_path: Path
) -> None:
    change(own_model, lambda t: t.add_tokens([AddedToken(f"word{number}") for number in range(60)]))
    (tmp_path / "t.txt").write_text("In the beginning word50 " * 9)
    text = ["--text", tmp_path / "t.txt"]
    known = "the model knows 128 tokens"
    refused(rq_compile("calibrate", own_model, *text, "-o", tmp_path / "c.json", "-q"), 2, "t.txt", known)
    path = engine_of(own_model)
    assert (
        json.loads(path.with_suffix(".json").read_text())["replaced"]["tokens of the tokenizer that the model does not know"]
        == 99 + 60 - 128
    )
    refused(rq_compile("evaluate", path, "--reference", own_model, *text, "-q"), 2, "t.txt", known)
    refused(rq_compile("generate", path, "--prompt", "a word50", "--json"), 2, "outside the vocabulary; give ids of 0 to 127")
    refused(rq_compile("generate", path, "--prompt", "", "--json"), 2, "empty")


def test_a_prompt_in_a_locale_without_utf8(stages: Path, rq_compile: Command, tmp_path: Path) -> None:
    import os

    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", tmp_path / "edge", "-q")
    assert result.exit_code == 0, result.stderr
    engine, prompt = str(stages / "model.onnx"), "Äpfel"
    wanted = json.loads(rq_compile("generate", engine, "--prompt", prompt, "--max-tokens", 4, "--json").stdout)

    def said(*command: object) -> bytes:
        run = subprocess.run([str(word) for word in command[:-1]] + [command[-1]], env=environment, capture_output=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    started = "import sys; from rq_compile.cli.main import main; main()"
    ours = said(sys.executable, "-c", started, "generate", engine, "--max-tokens", 4, "--prompt", prompt.encode())
    assert ours.decode() == f"{prompt}{wanted['text']}\n"
    theirs = said(sys.executable, tmp_path / "edge" / "generate.py", "--tokens", 4, prompt.encode())
    assert theirs.decode().removesuffix("\n") == wanted["text"]


# The Triton model, without a server.


def test_a_triton_stream_recovers_from_bytes_that_are_no_character(
    stages: Path, rq_compile: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rq_compile("package", stages / "model.onnx", "--for", "triton", "-o", tmp_path, "-q")
    assert result.exit_code == 0, result.stderr
    backend = ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.syspath_prepend(tmp_path / "model")
    (tmp_path / "model" / "1").rename(tmp_path / "model" / "version_1")
    from version_1.model import TritonPythonModel

    model = TritonPythonModel()
    model.tokenizer = text_tokenizers.byte_fallback()
    tokens = [model.tokenizer.token_to_id(token) for token in ("<0x0A>", "<0xF0>", "<0x9F>", "▁the", "<0xC3>")]
    pieces = list(model.pieces(iter(tokens)))
    assert [token for _, numbers in pieces for token in numbers] == tokens
    assert [text for text, _ in pieces] == ["\n", "", "", "\ufffd\ufffd the", "", "\ufffd"]
    model.tokenizer = None
    assert list(model.pieces(iter(tokens))) == [("", [token]) for token in tokens]


# Logits of the last tokens, and prompts in pieces.


@pytest.mark.parametrize("kept", [1, 3, 9, 40, 0])
def test_logits_of_the_last_tokens_are_the_last_of_all(stages: Path, kept: int) -> None:
    engine = Engine.load(stages / "model.onnx", threads=1)
    ids = np.random.default_rng(kept).integers(4, 99, (3, 9))
    feeds = engine._accepted(engine._session, engine._feeds(ids, None, None)) | {"logits_to_keep": np.array([kept])}
    some, every = engine._session.run(["logits"], feeds)[0], engine.logits(ids)
    np.testing.assert_array_equal(some, every[:, -kept:] if kept else every)
    del feeds["logits_to_keep"]
    np.testing.assert_array_equal(engine._session.run(["logits"], feeds)[0], every[:, -1:])


@pytest.mark.parametrize("chunk", [1, 2, 7, 30, 31, 512, None])
def test_a_prompt_in_pieces_is_continued_alike(stages: Path, chunk: int | None) -> None:
    engine = Engine.load(stages / "model.onnx", threads=1)
    assert engine.manifest.prefill_chunk == 512
    prompt = np.random.default_rng(0).integers(4, 99, 31).tolist()
    whole, pieces = (Engine(engine.path, engine.manifest.model_copy(update={"prefill_chunk": size}), 1) for size in (None, chunk))
    assert list(pieces.generate(prompt, 12, stop=False)) == list(whole.generate(prompt, 12, stop=False))


def test_rotations_that_follow_the_length_take_prompts_whole() -> None:
    from types import SimpleNamespace

    from rq_compile.targets.vocabulary import _rotates_by_length

    for parameters, by_length in (
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "yarn", "factor": 4.0}, False),
        ({"rope_type": "dynamic", "factor": 4.0}, True),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, True),
        (None, False),
    ):
        model: Any = SimpleNamespace(text_config=SimpleNamespace(rope_parameters=parameters))
        assert _rotates_by_length(model) == by_length
