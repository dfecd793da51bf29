"""Files between stages: read with clear errors, written under a temporary name and renamed, so that no output is half-written."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from rq_compile.errors import UserError, printable
from rq_compile.file_systems import PART, publish, readable
from rq_compile.violations import violation


class Document(BaseModel):
    """A file between stages: a closed set of keys, immutable once read, with finite numbers only.

    ``called``: its name in messages. ``command``: the command that writes it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    called: ClassVar[str] = "document"
    command: ClassVar[str] = "rq-compile"


Name = Annotated[str, BeforeValidator(readable)]  # the name of a file or folder in a document; the original need not be UTF-8
D = TypeVar("D", bound=Document)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``. ``publish`` it as ``path`` on success, and remove it on failure.

    Raises:
        UserError: the folder does not exist, cannot be written, or the disk is full.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=PART, suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another output with -o", 2) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        publish(temporary, path)
    except OSError as error:
        if error.filename is not None and name not in (error.filename, error.filename2):
            raise  # about another file, one that was read
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another output with -o") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``. ``publish`` it as ``path`` on success, and remove it on failure.

    Raises:
        UserError: ``path`` exists and is not an empty folder, its parent cannot be written, or the disk is full.
    """
    check_new_folder(path)
    path = path.resolve() if path.is_symlink() else path  # a folder cannot be renamed onto a link
    with _temporary_beside(path) as temporary:
        yield temporary
        publish(temporary, path)


@contextmanager
def files_written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``. On success, ``publish`` its files beside ``path`` under their names; on failure,
    remove them.

    Raises:
        UserError: the folder of ``path`` cannot be written, or the disk is full.
    """
    with _temporary_beside(path) as temporary:
        yield temporary
        for file in sorted(temporary.iterdir()):
            publish(file, path.with_name(file.name))


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    try:
        temporary = Path(tempfile.mkdtemp(prefix=PART, dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another output with -o", 2) from error
    try:
        yield temporary
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(temporary)):
            raise  # about another file, one that was read
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another output with -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def folder_made(path: Path) -> Iterator[None]:
    """Make the folder ``path`` if it does not exist, and remove it again if it is empty after a failure."""
    existed = path.is_dir()
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another output with -o", 2) from error
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):  # it has files
                path.rmdir()


def check_new_folder(path: Path) -> None:
    """
    Raises:
        UserError: ``path`` exists and is not an empty folder, or has a name that documents cannot hold.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; remove it or choose another with -o", 2)


def write_document(document: Document, path: Path) -> None:
    """Write ``document`` as indented JSON; the same document gives the same bytes."""
    with written_beside(path) as temporary:
        temporary.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_document(kind: type[D], path: Path) -> D:
    """Read and validate a JSON document.

    Raises:
        UserError: the file is missing, is not JSON, or does not follow the schema (the message names the first violation).
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {kind.called} {path}: {error.strerror}; check the path", 2) from error
    except ValidationError as error:
        kinds = [each["input"] for each in error.errors(include_url=False) if each["loc"] == ("kind",)]
        if kinds:
            given = printable(str(kinds[0]))
            raise UserError(f"{path} is a file of kind {given}, not a {kind.called}; give a {kind.called}", 2) from error
        raise UserError(
            f"{path} is not a valid {kind.called}: {violation(error)}; write it again with {kind.command}", 2
        ) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
