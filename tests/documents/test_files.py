"""Files between stages."""

import errno
import hashlib
import os
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from rq_compile.errors import UserError
from rq_compile.files import Document, folder_written_beside, read_document, sha256, write_document, written_beside

pytestmark = pytest.mark.quick


class Note(Document):
    called: ClassVar[str] = "note"
    command: ClassVar[str] = "rq-compile note"

    kind: Literal["note"] = "note"
    text: str
    number: float = 0.0


# Written whole or not at all


def test_written_beside_replaces_the_file_on_success(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_beside(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path, raised: BaseException) -> None:
    with written_beside(path) as temporary:
        temporary.write_text("half")
        raise raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), ValueError("bad"), UserError("no"), SystemExit(3)])
def test_written_beside_leaves_what_was_there_on_any_failure(tmp_path: Path, raised: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(raised)):
        write_half(path, raised)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_output(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left on device; free space") as caught:
        write_half(tmp_path / "a.txt", full)
    assert caught.value.exit_status == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_not_told_as_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"shard\.safetensors"), written_beside(tmp_path / "a.txt"):
        (tmp_path / "shard.safetensors").read_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_outputs_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with written_beside(tmp_path / "file") as temporary:
            temporary.touch()
        with folder_written_beside(tmp_path / "folder"):
            pass
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("raised", [ValueError("no"), KeyboardInterrupt()])
def test_a_folder_is_whole_or_not_there(tmp_path: Path, raised: BaseException) -> None:
    with pytest.raises(type(raised)), folder_written_beside(tmp_path / "folder") as temporary:  # noqa: PT012
        (temporary / "file").touch()
        raise raised
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not an empty folder; remove it"), folder_written_beside(tmp_path):
        pass
    assert (tmp_path / "file").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*No such file or directory; choose another output") as caught:
        write_half(tmp_path / "none" / "a.txt", ValueError())
    assert caught.value.exit_status == 2


# Documents


def test_a_document_survives_writing_and_reading(tmp_path: Path) -> None:
    note = Note(text="grüße\n", number=0.1)
    write_document(note, tmp_path / "note.json")
    assert read_document(Note, tmp_path / "note.json") == note
    write_document(note, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "note.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read note .*No such file or directory; check the path"),
        (
            "not json",
            r"is not a valid note: it is not JSON \(expected ident at line 1 column 2\); write it again with rq-compile note",
        ),
        ("[]", r"is not a valid note: it is \[\]: input should be an object"),
        ('{"text": 1}', "is not a valid note: text is 1: input should be a valid string"),
        ("{}", "is not a valid note: text is missing"),
        ('{"text": "a", "number": NaN}', "number is NaN: input should be a finite number"),
        ('{"text": "a", "more": 1}', "is not a valid note: more is not a key of this document"),
        ('{"kind": "plan", "text": "a"}', "is a file of kind plan, not a note; give a note"),
        (r'{"kind": "\u001b[2J", "text": "a"}', r"is a file of kind \\x1b\[2J, not a note"),
        (r'{"text": "a", "\u001b]0;x\u0007": 1}', r"\\x1b\]0;x\\x07 is not a key"),
        (r'{"text": {"\u009b": 1}}', r"text is \{\"\\u009b\": 1\}: input should"),
    ],
)
def test_a_document_that_is_none(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "note.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_document(Note, path)
    assert caught.value.exit_status == 2
    assert str(caught.value).isprintable()


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
