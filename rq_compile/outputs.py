"""The guard of outputs: checks before any work that a command can write its outputs, and that no other file is lost.

An output may be new, or replace an earlier output of the same kind. It must not be an input, under any name.
"""

import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from rq_compile.errors import UserError
from rq_compile.file_systems import PART, readable

CHECKSUMS = "SHA256SUMS"  # every package has it
CHOOSE = "choose another output with -o"
# What rq-compile adds before and after a file's name while it is written: ``.NAME.partial``.
LONGEST_PART = len(".partial") + 1
Recognizes = Callable[[Path], bool]


def check_outputs(outputs: Mapping[Path, tuple[str, Recognizes]], inputs: Iterable[Path] = ()) -> None:
    """``outputs``: path -> the kind of the output ("plan"), and a function that recognizes an earlier output of this kind.

    Raises:
        UserError: an output cannot be written, is one of the ``inputs``, or exists and is of another kind.
    """
    inputs = [path for path in inputs if path.exists()]
    for folder in dict.fromkeys(path.parent for path in outputs):
        check_folder(folder, next(path for path in outputs if path.parent == folder))
    for path, (kind, recognizes) in outputs.items():
        check_name(path)
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file with -o", 2)
        if not path.exists():
            continue
        if not path.is_file():
            raise UserError(f"cannot write {path}: it is not a regular file; {CHOOSE}", 2)
        if not recognizes(path):
            raise UserError(f"the {kind} would overwrite {path}, which {described(path)}; {CHOOSE}", 2)
        if any(path.samefile(source) for source in inputs):
            raise UserError(f"the {kind} would overwrite {path}, which this command reads; {CHOOSE}", 2)


def check_calibration(output: Path, inputs: Iterable[Path], *, statistics: bool) -> None:
    """Check the outputs of a calibration: ``output`` and, with ``statistics``, ``<stem>.safetensors``.

    Raises:
        UserError: ``output`` has the name of its statistics, or see ``check_outputs``.
    """
    if output.suffix == ".safetensors":
        raise UserError(f"-o {output} ends in .safetensors, which is for the calibration's statistics; end it in .json", 2)
    beside = {output.with_suffix(".safetensors"): STATISTICS} if statistics else {}
    check_outputs({output: document("calibration")} | beside, inputs)


def check_folder(folder: Path, output: Path) -> None:
    """
    Raises:
        UserError: the folder does not exist, or cannot be written to.
    """
    if not folder.is_dir():
        raise UserError(f"cannot write {output}: there is no folder {folder}; make it or {CHOOSE}", 2)
    try:
        # Permission bits do not show read-only file systems, and always allow root.
        with tempfile.TemporaryFile(prefix=PART, dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; {CHOOSE}", 2) from error


def check_name(output: Path) -> None:
    """
    Raises:
        UserError: the file system cannot hold a file of this name, or the documents beside it cannot name it.
    """
    if readable(output.name) != output.name:
        raise UserError(f"cannot write {readable(output.name)}: JSON cannot hold a name that is not UTF-8; {CHOOSE}", 2)
    with suppress(OSError):  # some file systems do not state the limit
        longest = os.pathconf(output.parent, "PC_NAME_MAX") - LONGEST_PART
        if (length := len(os.fsencode(output.name))) > longest:
            raise UserError(f"cannot write {output}: its name has {length} bytes, but only {longest} are possible; {CHOOSE}", 2)


# Which files are ours


def document_kind(path: Path) -> str | None:
    """``calibration``, ``plan``, ``sweep`` or ``engine``, as stated in the file; None for any other file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(1) != b"{":  # it may be a whole model's weights
            return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if kind in ("calibration", "plan", "sweep", "engine") else None


def document(kind: str) -> tuple[str, Recognizes]:
    """An output of ``check_outputs`` for a ``calibration``, a ``plan`` or a ``sweep``."""
    return kind, lambda path: document_kind(path) == kind


def _is_statistics(path: Path) -> bool:
    from rq_compile.checkpoint.safetensors_file import tensors_of
    from rq_compile.checkpoint.shards import STATISTICS

    with suppress(UserError):
        return all(name.endswith(STATISTICS) for name in tensors_of(path))
    return False


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return b'<meta name="generator" content="rq-compile' in file.read(1024)


def _is_package(path: Path) -> bool:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(f"/{CHECKSUMS}") for name in archive.namelist())
        with tarfile.open(path) as archive:
            return any(member.name.endswith(f"/{CHECKSUMS}") for member in archive)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError):
        return False


STATISTICS = "activation statistics", _is_statistics
REPORT = "report", _is_report
PACKAGE = "package", _is_package


def engine_of(manifest: Path) -> str | None:
    """The name of the engine that a manifest describes; None if the file is not a manifest."""
    if document_kind(manifest) != "engine":
        return None
    target = str(json.loads(manifest.read_bytes()).get("target"))
    return manifest.with_suffix(".plan" if target.startswith("tensorrt") else ".onnx").name


def described(path: Path) -> str:
    """A description of a file that would be lost, to complete "which"."""
    kind = document_kind(path)
    if kind == "engine":
        return f"is the manifest of {engine_of(path)}"
    if kind:
        return f"is a {kind}"
    return "holds weights of a model" if path.suffix == ".safetensors" else "rq-compile did not write"
