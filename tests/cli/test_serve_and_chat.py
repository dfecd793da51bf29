"""``rq-compile serve`` and ``rq-compile chat`` as a user starts and ends them."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from command_line import Run, python, refused

import rq_compile as rq
from rq_compile.cli.main import main
from rq_compile.standalone.sampling import GREEDY


def test_a_server_ends_cleanly(chat_engine: Path) -> None:
    arguments = ("-m", "rq_compile", "serve", str(chat_engine), "--port", "0", "--threads", "1", "--served-model-name", "tiny")
    process = python(*arguments)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving tiny on http://127.0.0.1:")
        address = line.split()[3].rstrip(":")
        assert httpx.get(f"{address}/health").status_code == 200
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
            process.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")  # an answer that has begun is completed
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, stdout, stderr) == (0, "", "the server has ended\n")


def test_arguments_that_a_server_refuses(chat_engine: Path, model: Path, rq_compile: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(rq_compile("serve", chat_engine, "--port", port), 2, f"cannot listen on 127.0.0.1:{port}", "--port")
    refused(rq_compile("serve", chat_engine, "--host", "no.such.host.invalid"), 2, "no host 'no.such.host.invalid'", "--host")
    refused(rq_compile("serve", chat_engine, "--port", 70_000), 2, "70000")
    refused(rq_compile("serve", chat_engine, "--prot", 1), 2, "no such option", "--port")
    refused(rq_compile("serve", model, "--port", 0), 2, "is not an engine")
    refused(rq_compile("serve", tmp_path / "none.onnx", "--port", 0), 2, "no such engine")


def test_without_the_packages_of_a_server(chat_engine: Path, rq_compile: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("rq_compile.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(rq_compile("serve", chat_engine), 2, "serve needs uvicorn", "pip install '.[serve]'")


def talk(chat_engine: Path, said: str, *options: object) -> Result:
    arguments = ["chat", str(chat_engine), "--threads", "1", "--temperature", "0", "--max-tokens", "8", *map(str, options)]
    return CliRunner().invoke(main, arguments, input=said)


def test_a_conversation_from_a_pipe(chat_engine: Path) -> None:
    engine = rq.load(chat_engine, threads=1)

    def answer(*contents: str) -> str:
        messages = [{"role": "system", "content": "Be brief."}]
        messages += [
            {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
        ]
        return "".join(engine.chat(messages, 8, sampling=GREEDY))

    first = answer("Hello")
    second = answer("Hello", first, "Why?")
    result = talk(chat_engine, "Hello\n\nWhy?\n/reset\nHello\n/exit\nnot read\n", "--system", "Be brief.")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert result.stderr == "a new conversation begins\n"
    said = json.loads(talk(chat_engine, "Hello\nWhy?", "--system", "Be brief.", "--json").stdout)["messages"]
    assert [message["content"] for message in said] == ["Be brief.", "Hello", first, "Why?", second]


def test_what_a_conversation_refuses(chat_engine: Path, stages: Path) -> None:
    refused(talk(stages / "model.onnx", "Hello\n"), 2, "has no chat template")
    refused(talk(chat_engine, "Hello\n", "--top-p", 3), 2, "--top-p is 3")
    refused(talk(chat_engine, "a" * 300), 1, "the context of the model has 256", "/reset")
    assert "there is no command /quit; /reset begins" in talk(chat_engine, "/quit\n").stderr


def test_a_conversation_begins_quickly_and_without_the_compiler(chat_engine: Path) -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from rq_compile.cli.main import main; main()"
    command = [sys.executable, "-P", "-c", code, "chat", str(chat_engine), "-q", "--max-tokens", "3", "--seed", "1"]
    root = str(Path(rq.__file__).parents[1])
    said = subprocess.run(command, input="Hi\n", capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": "/usr/bin"})
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
