"""Texts as people have them: plain files, rows of JSON lines or Parquet, and conversations through a model's chat template.

They are read a piece at a time, so that a text may be larger than memory.
"""

import glob
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rq_compile.checkpoint.chat_template import chat_template_source, special_tokens
from rq_compile.errors import UserError, reason

if TYPE_CHECKING:
    from rq_compile.standalone.chat_template import ChatTemplate

# Fields of a row that are tried, in this order, if no field is named.
FIELDS = ("text", "messages")
BETWEEN = "\n\n"
# Characters of a plain file that are read at a time.
PIECE = 1 << 20
Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]


@dataclass(frozen=True)
class Text:
    """What ``pieces()`` reads, from the start whenever it is called; ``sha256`` of all of it in UTF-8."""

    pieces: Callable[[], Iterable[str]]
    sha256: str

    @classmethod
    def of(cls, content: "str | Text") -> Self:
        """The content as a text, or the text that it is."""
        if isinstance(content, cls):
            return content
        assert isinstance(content, str)
        return cls(lambda: (content,), hashlib.sha256(content.encode()).hexdigest())

    def read(self) -> str:
        """All of it."""
        return "".join(self.pieces())


def read_texts(paths: Sequence[Path], *, render: Render | None = None) -> dict[str, str]:
    """The texts of ``open_texts``, read.

    Raises:
        UserError: see ``open_texts``.
    """
    return {name: text.read() for name, text in open_texts(paths, render=render).items()}


def open_texts(
    paths: Sequence[Path],
    *,
    field: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    render: Render | None = None,
) -> dict[str, Text]:
    """File name -> text, without a byte order mark at its start. All is read once, and checked.

    A path may be a pattern (``*``, ``?``, ``[]``). From .jsonl and .parquet files, ``field`` of every row is read (by default
    ``text``, otherwise ``messages``), or of ``samples`` random rows, chosen by ``seed``. If the field is a list of messages,
    ``render`` turns it into text.

    Raises:
        UserError: no file was given, one cannot be read, is not UTF-8 text, is empty or has no such field, or two have the same
            name.
    """
    if not paths:
        raise UserError("there is no text to run; give at least one --text FILE", 2)
    texts: dict[str, Text] = {}
    for path in (found for given in paths for found in _files(given)):
        read = partial(_joined_rows, path, field, samples, seed, render) if has_rows(path) else partial(_plain, path)
        text = _checked(path, read)
        if path.name in texts:
            raise UserError(f"two --text files are named {path.name}; rename one, as results are listed by name", 2)
        texts[path.name] = text
    return texts


def _checked(path: Path, read: Callable[[], Iterable[str]]) -> Text:
    if not path.is_file():  # a pipe, say, which can be read once
        content = list(read())
        read = partial(iter, content)
    digest, empty = hashlib.sha256(), True
    try:
        for piece in read():
            digest.update(piece.encode())
            empty = empty and not piece.strip()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(
            f"--text {path} has {half}, half of a UTF-16 surrogate pair; correct that row or leave it out", 2
        ) from error
    if empty:
        raise UserError(f"--text {path} is empty; give a file with text", 2)
    return Text(read, digest.hexdigest())


def has_rows(path: Path) -> bool:
    return path.suffix in (".jsonl", ".parquet")


def _files(given: Path) -> list[Path]:
    if given.exists() or not glob.has_magic(str(given)):
        return [given]
    found = [Path(name) for name in sorted(glob.glob(str(given), recursive=True)) if Path(name).is_file()]
    if not found:
        raise UserError(f"no file matches --text {given}; check the pattern", 2)
    return found


def _plain(path: Path) -> Iterator[str]:
    before = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                if (place := piece.find("\0")) >= 0:
                    number = before + place
                    raise UserError(
                        f"--text {path} has a NUL character (number {number}), as binary files do; give a text file", 2
                    )
                before += len(piece)
                yield piece
    except OSError as error:
        raise UserError(f"cannot read --text {path}: {error.strerror}; check the path", 2) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not UTF-8 text; convert it or give another file", 2) from error


def _joined_rows(path: Path, field: str | None, samples: int | None, seed: int, render: Render | None) -> Iterator[str]:
    rows = _json_lines(path) if path.suffix == ".jsonl" else _parquet(path)
    for number, text in enumerate(_chosen(path, rows, field, samples, seed, render)):
        if number:
            yield BETWEEN
        yield text


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"line {number} of --text {path} is not a JSON object; give one object per line", 2)
                    yield row
    except OSError as error:
        raise UserError(f"cannot read --text {path}: {error.strerror}; check the path", 2) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not UTF-8 text; convert it or give another file", 2) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"line {number} of --text {path} is not JSON; give one object per line, or rename plain text", 2
        ) from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"--text {path} needs pyarrow, which is not installed; run pip install pyarrow", 2) from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read --text {path}: {reason(error)}; give a Parquet file", 2) from error


def _chosen(
    path: Path, rows: Iterator[dict[str, Any]], field: str | None, samples: int | None, seed: int, render: Render | None
) -> Iterator[str]:
    """The texts of all rows, or of ``samples`` rows, in the order of the file."""
    kept = rows if samples is None else iter(_sampled(rows, samples, seed))
    for row in kept:
        name = field or next((name for name in FIELDS if name in row), None)
        if name is None or name not in row:
            fields = ", ".join(map(str, row)) or "none"
            wanted = field or " or ".join(FIELDS)
            raise UserError(f"a row of --text {path} has no field {wanted} (its fields: {fields}); name one with --field", 2)
        value = row[name]
        if _is_conversation(value):
            if render is None:
                raise UserError(
                    f"--text {path} holds conversations, but there is no chat template to format them with; "
                    "give text, or name a field of text with --field",
                    2,
                )
            yield render(value)
        elif isinstance(value, str):
            yield value
        else:
            raise UserError(f"the field {name} of a row of --text {path} is not text; name another with --field", 2)


def _sampled(rows: Iterator[dict[str, Any]], samples: int, seed: int) -> list[dict[str, Any]]:
    """Reservoir sampling (Vitter's Algorithm R), which holds only the rows that it keeps. Returns them in the order of the
    file."""
    chance = random.Random(seed)
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, row in enumerate(rows):
        if number < samples:
            kept.append((number, row))
        elif (place := chance.randrange(number + 1)) < samples:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def chat_template(folder: Path) -> Render:
    """A function that formats conversations with the tokenizer of the checkpoint in ``folder``.

    Raises:
        UserError: when the function is called: there is no chat template, or it refuses the conversation.
    """

    template: ChatTemplate | None = None

    def render(messages: Messages) -> str:
        nonlocal template
        from rq_compile.standalone.chat_template import ChatTemplate, ChatTemplateError

        try:
            if template is None:
                if (source := chat_template_source(folder)) is None:
                    raise UserError(
                        f"{folder} has no chat template for the messages of --text; name a field of text with --field", 2
                    )
                template = ChatTemplate(source, special_tokens(folder))
            return template.render(messages, add_generation_prompt=False)
        except ChatTemplateError as error:
            raise UserError(f"the chat template of {folder} refuses a conversation: {reason(error)}; leave it out", 2) from error

    return render
