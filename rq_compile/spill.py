"""Working files that are too large for memory, or that another program reads. They are in the system's temporary folder.

If the system has no writable temporary folder (for example in a read-only container), they are written beside the output.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rq_compile.errors import UserError, reason

log = logging.getLogger(__name__)
PREFIX = "rq-compile-"
_output_folder: Path | None = None


@contextmanager
def beside(output: Path) -> Iterator[None]:
    """Within this context, the folder of ``output`` replaces a missing temporary folder."""
    global _output_folder
    before, _output_folder = _output_folder, output.parent
    try:
        yield
    finally:
        _output_folder = before


def folder() -> Path:
    """
    Raises:
        UserError: there is neither a temporary folder nor an output whose folder could be used.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        if _output_folder is None:
            raise UserError(f"the system has no usable temporary folder ({reason(error)}); name one in TMPDIR", 2) from error
        log.warning("the system has no usable temporary folder; working files go to %s", _output_folder)
        return _output_folder


def unnamed_file() -> BinaryIO:
    """A file that disappears when it is closed, however the process ends.

    Raises:
        OSError: the disk is full.
        UserError: see ``folder``.
    """
    return tempfile.TemporaryFile(prefix=PREFIX, dir=folder())


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for a ``with`` statement. Raises the same errors as ``unnamed_file``."""
    return tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder())
