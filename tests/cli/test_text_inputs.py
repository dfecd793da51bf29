"""Texts and prompts that are empty, or that the locale or the model cannot represent; and a Triton stream of unusual bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import text_tokenizers
from click.testing import Result
from command_line import PACKAGED_IN, refused
from own_engines import change
from tokenizers import AddedToken, Tokenizer

from rq_compile.standalone.sampling import Choice

Command = Callable[..., Result]


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
    known = "the model has 128 tokens"
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
    environment = {**os.environ, "PYTHONPATH": str(PACKAGED_IN), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", tmp_path / "edge", "-q")
    assert result.exit_code == 0, result.stderr
    engine, prompt = str(stages / "model.onnx"), "Äpfel"
    wanted = json.loads(rq_compile("generate", engine, "--prompt", prompt, "--max-tokens", 4, "--json").stdout)

    def said(*command: Any) -> bytes:
        run = subprocess.run([str(word) for word in command[:-1]] + [command[-1]], env=environment, capture_output=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    started = "import sys; from rq_compile.cli.main import main; main()"
    ours = said(sys.executable, "-P", "-c", started, "generate", engine, "--max-tokens", 4, "--prompt", prompt.encode())
    assert ours.decode() == f"{prompt}{wanted['text']}\n"
    theirs = said(sys.executable, tmp_path / "edge" / "generate.py", "--tokens", 4, prompt.encode())
    assert theirs.decode().removesuffix("\n") == wanted["text"]


# The Triton model, without a server.


def test_a_triton_stream_recovers_from_bytes_that_are_no_character(
    stages: Path, rq_compile: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rq_compile("package", stages / "model.onnx", "--for", "triton", "-o", tmp_path, "-q")
    assert result.exit_code == 0, result.stderr
    backend: Any = ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.InferenceResponse = lambda _, array: array, list
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.syspath_prepend(tmp_path / "model")
    (tmp_path / "model" / "1").rename(tmp_path / "model" / "version_1")
    from version_1.model import Reply, Request, SamplingParams

    tokenizer = text_tokenizers.byte_fallback()
    tokens: list[Any] = [tokenizer.token_to_id(token) for token in ("<0x0A>", "<0xF0>", "<0x9F>", "▁the", "<0xC3>")]

    def sent(tokenizer: Tokenizer | None) -> list[tuple[str, list[int]]]:
        """The text and the tokens of every response."""
        responses: list[Any] = []
        reply = Reply(SimpleNamespace(send=lambda response=None, flags=0: responses.append(response)), tokenizer)
        reply.expect(Request("", chat=False, params=SamplingParams(), stream=True))
        answer = SimpleNamespace(error=None, finish_reason=None, cancelled=False, cancel=lambda: None)
        ended = [reply.add(answer, [choice]) for choice in [*map(Choice, tokens), None]]
        assert ended == [False] * len(tokens) + [True]
        assert responses.pop() is None  # the end
        return [(text[0].decode(), ids.tolist()) for text, ids in responses]

    texts = ["\n", "", "", "\ufffd\ufffd the", "", "\ufffd"]
    assert sent(tokenizer) == list(zip(texts, [*([token] for token in tokens), []], strict=True))
    assert sent(None) == [("", [token]) for token in tokens]
