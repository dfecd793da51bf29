"""Writes files as one folder or one archive. Archives are reproducible: times, owners, modes and order are fixed.

Files of any size are streamed. Another version of the gzip or zip library may compress to other bytes.
"""

import gzip
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from rq_compile.files import check_new_folder, folder_written_beside, written_beside
from rq_compile.outputs import PACKAGE, check_outputs

Files = Mapping[str, Path]  # name in the package -> path of its content
MODE = 0o644
LEVEL = 1  # a higher level is much slower and hardly makes weights smaller
CHUNK = 1 << 20
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can store


def check_package(output: Path, inputs: Iterable[Path]) -> None:
    """Check before the work that ``write_files`` can write ``output``.

    Raises:
        UserError: see ``check_outputs`` and ``check_new_folder``.
    """
    if archive_writer(output) is None:
        check_new_folder(output)
    else:
        check_outputs({output: PACKAGE}, inputs)


def write_files(files: Files, output: Path, root: str) -> None:
    """Write ``files`` to the folder ``output`` or, if ``output`` is named as an archive, to the folder ``root`` in the archive.

    Raises:
        UserError: see ``folder_written_beside`` and ``written_beside``.
    """
    write = archive_writer(output)
    if write is None:
        with folder_written_beside(output) as folder:
            for name, path in files.items():
                shutil.copyfile(path, folder / name)
    else:
        with written_beside(output) as part, part.open("wb") as file:
            write({f"{root}/{name}": files[name] for name in sorted(files)}, file)


def write_tar(files: Files, output: BinaryIO) -> None:
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=LEVEL, fileobj=output, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, path in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = path.stat().st_size, MODE
            with path.open("rb") as content:
                archive.addfile(entry, content)


def write_zip(files: Files, output: BinaryIO) -> None:
    with zipfile.ZipFile(output, "w", compresslevel=LEVEL) as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr = 3, MODE << 16  # Unix
            entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, path.stat().st_size
            with path.open("rb") as content, archive.open(entry, "w") as stream:
                shutil.copyfileobj(content, stream, CHUNK)


ARCHIVES: dict[str, Callable[[Files, BinaryIO], None]] = {".tar.gz": write_tar, ".tgz": write_tar, ".zip": write_zip}


def archive_writer(output: Path) -> Callable[[Files, BinaryIO], None] | None:
    """The writer for the kind of archive that ``output`` names; None if it does not name an archive."""
    return next((writer for ending, writer in ARCHIVES.items() if output.name.endswith(ending)), None)
