"""A large output that survives an interruption: a partial file beside it, and a journal of its complete sections.

The journal is a text file with one JSON object per line: first a description of the inputs, then a line for each section that was
written. While it is open, the partial file is locked, so that two processes do not write it at the same time.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from rq_compile.errors import UserError
from rq_compile.file_systems import lock, publish
from rq_compile.files import Document
from rq_compile.processes import ProcessLost

# Large writes leave the file in huge pages of the page cache, from which it is mapped later. The kernels read these faster.
WRITTEN_AT_ONCE = 1 << 24

Job = dict[str, str | int | None]
Say = Callable[[str], None]


class Record(Document):
    """A complete section, from the end of the previous one to ``end``, in bytes of the file; ``sha256`` is that of all bytes up
    to there."""

    section: str
    end: int
    sha256: str


class Journal:
    """The complete sections of ``file``, on disk and in ``records``."""

    def __init__(self, path: Path, file: BinaryIO, records: list[Record], say: Say) -> None:
        self.path = path
        self.file = file
        self.records = records
        self._say = say

    def add(self, record: Record) -> None:
        """Record that the next section was written to ``file`` and flushed."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(record.model_dump_json() + "\n")

    def distrust(self, number: int) -> None:
        """Drop section ``number`` and all later ones, because they differ from what was written."""
        self._say(f"{self.records[number].section} of the partial file differs from what was written; continuing from there")
        del self.records[number:]
        _write_lines(self.path, self.path.read_text(encoding="utf-8").splitlines()[0], self.records)


@contextmanager
def resumable(path: Path, job: Job, *, fresh: bool = False, say: Say = lambda text: None) -> Iterator[Journal]:
    """Yield the journal of the partial file of ``path``: that of an earlier identical ``job``, unless ``fresh``, or a new one.

    On success, the partial file is renamed to ``path``. After an interruption, a full disk, a lack of memory or the loss of
    another process, it and the journal stay if a section is complete. On any other failure, they are removed. ``say`` takes a
    sentence for the user.

    Raises:
        UserError: another process writes ``path``, or it cannot be written.
    """
    partial, lines = path.with_name(f".{path.name}.partial"), _journal(path)
    try:
        file = _locked(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another output with -o", 2) from error
    journal = Journal(lines, file, [], say)
    try:
        journal.records += _records(lines, job, path, fresh, say)
        if not journal.records:
            file.truncate(0)
        # Drop a line that was cut off, to which the next would be appended.
        _write_lines(lines, json.dumps(job), journal.records)
        yield journal
        file.flush()
        # Before the rename, after which another process may use the two names.
        lines.unlink()
        publish(partial, path)
    except BaseException as error:
        if isinstance(error, OSError | MemoryError | ProcessLost | KeyboardInterrupt | SystemExit) and journal.records:
            say(f"{partial} holds the finished part; the same command continues from there, or starts over with --fresh")
        else:
            # In this order: once the locked partial file is gone, the journal may belong to another process.
            lines.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
        # An error that names another file is about an input.
        if isinstance(error, OSError) and error.filename in (None, str(partial), str(lines)):
            reason = error.strerror or error
            raise UserError(f"cannot write {path}: {reason}; free space or choose another output with -o") from error
        raise
    finally:
        # Data that is still buffered after a failure must not be written or fail again.
        file.raw.close()


def has_begun(path: Path) -> bool:
    """Whether an earlier job may have left a part of ``path``."""
    return _journal(path).exists()


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


def _locked(partial: Path, path: Path) -> BufferedRandom:
    while True:
        file = BufferedRandom(FileIO(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+"), WRITTEN_AT_ONCE)
        try:
            lock(file.fileno(), path)
        except BlockingIOError:
            file.close()
            raise UserError(f"another rq-compile is writing {path}; wait for it or choose another output with -o", 2) from None
        # Between opening and locking, the file may have become another process's finished output, or may be gone.
        if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            return file
        file.close()


def _records(lines: Path, job: Job, path: Path, fresh: bool, say: Say) -> list[Record]:
    """The journal's records of an identical job, up to the first line that was cut off."""
    if fresh or not lines.exists():
        return []
    first, *rest = lines.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if first != json.dumps(job):
        say(f"the partial {path.name} was begun {_difference(first, job)}; starting over")
        return []
    records: list[Record] = []
    for line in rest:
        try:
            records.append(Record.model_validate_json(line))
        except ValidationError:
            break
    if records:
        say(f"continuing {path.name} after {records[-1].section}")
    return records


def _difference(first: str, job: Job) -> str:
    try:
        before = json.loads(first)
        names = [name for name in job if before.get(name) != job[name]]
    except (ValueError, AttributeError):
        names = []
    return f"with another {' and '.join(names)}" if names else "in another way"


def _write_lines(path: Path, job: str, records: list[Record]) -> None:
    path.write_text("".join(f"{line}\n" for line in (job, *(record.model_dump_json() for record in records))), encoding="utf-8")
