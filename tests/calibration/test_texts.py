"""Texts in the forms that users have: rows of JSON lines and Parquet, conversations, patterns, samples."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from calibrated import TEXTS, letters
from command_line import refused
from command_line import run_command as run
from pyarrow.parquet import write_table

from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.files import read_document
from rq_compile.texts import chat_template, open_texts, read_texts

Row = dict[str, Any]
DOCUMENTS: list[Row] = [{"text": f"document {number}", "title": f"title {number}", "stars": number} for number in range(20)]
TALK = [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}], [{"role": "user", "content": "Bye."}]]
SAID = "<user>Hi.<assistant>Hello!\n\n<user>Bye."


def json_lines(path: Path, rows: Sequence[object], encoding: str = "utf-8") -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding=encoding)
    return path


def parquet(path: Path, rows: Sequence[Row]) -> Path:
    write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


WRITERS: dict[str, Callable[..., Path]] = {".jsonl": json_lines, ".parquet": parquet}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The chat template of a checkpoint."""
    folder = tmp_path / "model"
    folder.mkdir()
    template = "{{ bos_token }}{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    return folder


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows(tmp_path: Path, model: Path, suffix: str) -> None:
    write = WRITERS[suffix]
    path = write(tmp_path / f"a{suffix}", DOCUMENTS)
    whole = "\n\n".join(row["text"] for row in DOCUMENTS)
    assert read_texts([path]) == {path.name: whole}
    assert open_texts([path], field="title")[path.name].read().startswith("title 0\n\ntitle 1\n\n")
    some = open_texts([path], samples=5, seed=1)[path.name].read().split("\n\n")
    assert len(set(some)) == 5
    assert some == [text for text in whole.split("\n\n") if text in some]  # in the order of the file
    assert some == open_texts([path], samples=5, seed=1)[path.name].read().split("\n\n")
    assert some != open_texts([path], samples=5, seed=2)[path.name].read().split("\n\n")
    assert open_texts([path], samples=99)[path.name].read() == whole
    talk = write(tmp_path / f"talk{suffix}", [{"id": number, "messages": messages} for number, messages in enumerate(TALK)])
    assert read_texts([talk], render=chat_template(model))[talk.name] == SAID
    other = write(tmp_path / f"other{suffix}", [{"text": "ignored", "conversation": messages} for messages in TALK])
    assert open_texts([other], field="conversation", render=chat_template(model))[other.name].read() == SAID


def test_patterns_and_byte_order_marks(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "[c].txt"):
        (tmp_path / name).write_text(name)
    json_lines(tmp_path / "mark.jsonl", [{"text": "one"}], encoding="utf-8-sig")
    assert list(read_texts([tmp_path / "?.txt"])) == ["a.txt", "b.txt"]
    assert list(read_texts([tmp_path / "[c].txt", tmp_path / "*.jsonl"])) == ["[c].txt", "mark.jsonl"]
    assert read_texts([tmp_path / "mark.jsonl"]) == {"mark.jsonl": "one"}
    with pytest.raises(UserError, match=r"two --text files are named a\.txt"):
        read_texts([tmp_path / "a.txt", tmp_path / "*.txt"])
    with pytest.raises(UserError, match=r"no file matches --text .*\*\.md; check the pattern"):
        read_texts([tmp_path / "*.md"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": \n', r"line 2 of --text .*a\.jsonl is not JSON; give one object per line"),
        (b"Call me Ishmael.\n", r"line 1 of .* is not JSON; give one object per line, or rename plain text"),
        (b'"text"\n', "line 1 of .* is not a JSON object"),
        (b"[" * 100_000, "line 1 of .* is not JSON"),
        (b'{"body": "a", "id": 1}\n', r"has no field text or messages \(its fields: body, id\); name one with --field"),
        (b'{"text": "a"}\n{}\n', r"has no field text or messages \(its fields: none\)"),
        (b'{"text": 3}\n', "the field text of a row of .* is not text; name another with --field"),
        (b'{"text": ["a"]}\n', "the field text of a row of .* is not text"),
        (b'{"text": null}\n', "the field text of a row of .* is not text"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "holds conversations, but there is no chat template"),
        (b'\xff\xfe{\x00"\x00', "is not UTF-8 text"),
        (b"\n\n", "is empty; give a file with text"),
        (b'{"text": " "}\n', "is empty; give a file with text"),
    ],
)
def test_refuses_json_lines(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said) as refusal:
        read_texts([tmp_path / "a.jsonl"])
    assert refusal.value.exit_status == 2


def test_refuses_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"cannot read --text .*a\.parquet: .*; give a Parquet file"):
        read_texts([tmp_path / "a.parquet"])
    with pytest.raises(UserError, match=r"cannot read --text .*none\.parquet"):
        read_texts([tmp_path / "none.parquet"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow, which is not installed; run pip install pyarrow"):
        read_texts([tmp_path / "a.parquet"])


def test_chat_templates(model: Path) -> None:
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template for the messages of --text; name a field of text"):
        chat_template(model)(TALK[0])
    for stated in (template, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]):
        settings = {"chat_template": stated, "bos_token": {"content": "<s>"}}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        assert chat_template(model)(TALK[0]) == "<s><user>Hi.<assistant>Hello!"
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="refuses a conversation: roles must alternate; leave it out"):
        chat_template(model)(TALK[0])


def test_on_the_command_line(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The same text gives the same calibration if it comes from rows; options that choose rows are rejected for plain text."""
    text = TEXTS["first.txt"]
    json_lines(tmp_path / "a.jsonl", [{"body": text}])
    parquet(tmp_path / "a.parquet", [{"body": text}, {"body": letters(50, 9)}])
    (tmp_path / "a.txt").write_text(text)
    given = ["calibrate", tiny_checkpoint("olmoe"), "--quantizer", "nearest", "--sequence-length", 8]
    assert run(*given, "--text", tmp_path / "a.txt", "-o", tmp_path / "plain.json").exit_code == 0
    assert run(*given, "--text", tmp_path / "*.jsonl", "--field", "body", "-o", tmp_path / "rows.json").exit_code == 0
    plain, rows = (read_document(Calibration, tmp_path / f"{name}.json") for name in ("plain", "rows"))
    assert plain.layers == rows.layers
    chosen = ["--text", tmp_path / "a.parquet", "--field", "body", "--samples", 1]
    assert run(*given, *chosen, "-o", tmp_path / "one.json").exit_code == 0
    assert read_document(Calibration, tmp_path / "one.json").tokens in (len(text), 50)
    result = run(*given, "--text", tmp_path / "a.txt", "--samples", 3, "-o", tmp_path / "no.json")
    refused(result, 2, "--samples is for the rows of .jsonl and .parquet files, but --text", "a.txt has no rows")
