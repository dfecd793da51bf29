"""``generate --batch``: prompts of a file, which share the steps of the engine."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Command = Callable[..., Result]
PROMPTS = ["The hacker", "A jargon file", "hack", "Unix is not so much a product", "To be", "x", "In the", "foo", "he said"]


def lines(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def alone(rq_compile: Command, stages: Path, prompt: str, *options: object) -> dict:
    result = rq_compile("generate", stages / "model.onnx", "--prompt", prompt, "--threads", 1, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_answers_are_those_of_each_prompt_alone_in_the_order_of_the_file(
    rq_compile: Command, stages: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    command = ("generate", stages / "model.onnx", "--batch", tmp_path / "prompts.txt", "--max-tokens", 9, "--threads", 1)
    found = lines(rq_compile(*command))
    assert [answer["prompt"] for answer in found] == PROMPTS
    for answer in found[:4]:
        own = alone(rq_compile, stages, answer["prompt"], "--max-tokens", 9)
        assert (answer["text"], answer["tokens"]) == (own["text"], own["tokens"])
        assert answer["finish_reason"] == ("length" if len(own["tokens"]) == 9 else "stop")
    as_json = rq_compile(*command, "--json")
    assert json.loads(as_json.stdout)["answers"] == found


def test_a_line_has_its_own_parameters(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    whole = alone(rq_compile, stages, "hack", "--max-tokens", 20, "--ignore-eos")["text"]
    asked = [
        {"prompt": "hack", "max_tokens": 3},
        {"prompt": "hack", "temperature": 1.0, "seed": 5},
        {"prompt": "hack", "max_tokens": 20, "stop": whole[4:6]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    command = ("generate", stages / "model.onnx", "--batch", tmp_path / "p.jsonl", "--max-tokens", 9, "--ignore-eos")
    short, drawn, stopped = lines(rq_compile(*command, "--threads", 1))
    assert len(short["tokens"]) == 3
    seeded = alone(rq_compile, stages, "hack", "--temperature", 1, "--seed", 5, "--max-tokens", 9, "--ignore-eos")
    assert drawn["tokens"] == seeded["tokens"]
    assert stopped["text"] == whole.split(whole[4:6])[0]
    assert stopped["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"\n  \n", "has no prompts"),
        ("p.txt", b"\xff\xfe", "cannot read"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2 of"),
        ("p.jsonl", b'["a"]\n', 'has no text "prompt"'),
        ("p.jsonl", b'{"prompt": 3}\n', 'has no text "prompt"'),
        ("p.jsonl", b'{"prompt": "a", "temprature": 1}\n', "'temprature', which is not a parameter; use .*temperature"),
        ("p.jsonl", b'{"prompt": "a", "top_p": 2}\n', "line 1 of .*top_p is 2; give"),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1 of .* cannot be continued: the prompt is empty"),
        ("p.txt", b"a" * 400, "line 1 of .* cannot be continued: 400 tokens"),
    ],
)
def test_lines_that_cannot_be_continued_are_named(
    rq_compile: Command, stages: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = rq_compile("generate", stages / "model.onnx", "--batch", tmp_path / name, "--threads", 1)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(words, " ".join(result.stderr.split())), result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "nothing to continue; give --prompt TEXT or --batch FILE"),
        (("--batch", "p.txt", "--prompt", "a"), "--prompt has no effect with --batch"),
        (("--batch", "p.txt", "--logprobs", 2, "--json"), "--logprobs has no effect with --batch"),
        (("--batch", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_options_that_exclude_each_other(rq_compile: Command, stages: Path, options: tuple, words: str) -> None:
    result = rq_compile("generate", stages / "model.onnx", *options)
    assert result.exit_code == 2
    assert words in " ".join((result.stderr + result.stdout).split())
