"""The files of a checkpoint's folder. No name and no link in the folder may lead out of it.

A folder from a stranger may hold a link to any file of the user. Its content would then be read as part of the model or, worse,
copied into an engine that is given away (as a tokenizer or a licence). The only outward links that are followed are those of the
hub cache: ``models--org--name/snapshots/<revision>/<file>`` to ``models--org--name/blobs/<hash>``.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from rq_compile.errors import UserError, reason

MAX_JSON_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BELOW = ("*/config.json", "snapshots/*/config.json", "*/snapshots/*/config.json")


def refuse_links_outward(folder: Path) -> None:
    """
    Raises:
        UserError: an entry of ``folder`` is a link that leads out of it, or the folder cannot be listed.
    """
    try:
        links = [entry for entry in sorted(folder.iterdir()) if entry.is_symlink()]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions", 2) from error
    for link in links:
        if not _belongs(folder, link):
            raise UserError(f"{folder} has a link {link.name!r} out of it; put the file itself in its place", 2)


def file_in(folder: Path, name: str) -> Path:
    """The path of ``name``, a relative path from a file of the checkpoint. The file may be missing.

    Raises:
        UserError: ``name`` is absolute or contains ``..``, or a link on the way leads out of the folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or not name.isprintable() or "\\" in name:
        raise UserError(f"{folder} names a file {name!r}, which is not a path inside it; correct the index that names it", 2)
    if not _belongs(folder, folder / path):
        raise UserError(f"{folder} names a file {name!r}, which is a link out of it; put the file itself in its place", 2)
    return folder / path


def refuse_pointer(file: Path) -> None:
    """
    Raises:
        UserError: ``file`` is the pointer that git-lfs leaves instead of a large file that was not fetched.
    """
    try:
        with file.open("rb") as opened:
            pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return  # the reader of the file reports this
    if pointer:
        raise UserError(f"{file} is a git-lfs pointer, not the file itself; run git lfs pull in {file.parent}", 2)


def checkpoint_below(folder: Path) -> Path | None:
    """The checkpoint inside a folder that is not one itself: the current snapshot of a hub repository, or the only checkpoint."""
    main = folder / "refs" / "main"
    if (
        main.is_file()
        and (named := folder / "snapshots" / main.read_text(encoding="utf-8").strip()[:64] / "config.json").is_file()
    ):
        return named.parent
    found = [file.parent for pattern in BELOW for file in sorted(folder.glob(pattern))]
    return found[0] if len(found) == 1 else None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that ``file`` holds.

    Raises:
        UserError: there is no such file, or it does not hold a JSON object.
    """
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is not a file; give a Hugging Face checkpoint directory", 2)
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{file} has more than {MAX_JSON_BYTES} bytes; give the checkpoint's own file", 2)
        refuse_pointer(file)
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} is missing; give a Hugging Face checkpoint directory", 2) from None
    except RecursionError:
        raise UserError(f"cannot read {file}: it is nested too deeply; give the checkpoint's own file", 2) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {reason(error)}; correct it, or copy the published one there", 2) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object; copy the published file there", 2)
    return content


def _belongs(folder: Path, path: Path) -> bool:
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # circular links
        return False
    if target.is_relative_to(root):
        return True
    repository = root.parent.parent
    return root.parent.name == "snapshots" and target.parent == repository / "blobs"
