"""Operations that some file systems do not support: syncing, permissions, locks.

Network file systems and mounted buckets lack some of them. Outputs are complete without them, so a failure is only logged.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
PART = ".rq-compile."  # prefix of unfinished outputs; short, because the output's name may already have the maximum length
# Errors by which file systems report unsupported operations, as opposed to damage (EIO) or a full disk.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.ENOTTY})


def readable(name: object) -> object:
    """A name of the file system as UTF-8 text: bytes that are not UTF-8 are written as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if isinstance(name, str) else name


@contextmanager
def optional(what: str, folder: Path) -> Iterator[None]:
    """Continue if the file system of ``folder`` does not support the operation in the block. ``what`` completes "cannot ..."."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("the file system of %s cannot %s (%s); continuing without", folder, what, error.strerror)


def sync(path: Path) -> None:
    """Write a file or folder, without the contents of the folder, to the disk before continuing.

    Raises:
        OSError: the disk failed or is full.
    """
    with optional("sync files to the disk", path if path.is_dir() else path.parent):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:
            return  # the folder may be written to, but not listed
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """``sync`` everything in ``folder``, then the folder."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def permit(path: Path, mode: int) -> None:
    """Set ``mode`` minus the umask, as open() and mkdir() do; tempfile creates files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    with optional("change permissions", path.parent):
        path.chmod(mode & ~umask)


def publish(part: Path, path: Path) -> None:
    """Rename a finished file or folder. After a crash of the machine, ``path`` is the old one or the complete new one.

    Raises:
        OSError: the disk is full or failed, or the file cannot be renamed.
    """
    folder = part.is_dir()
    permit(part, 0o777 if folder else 0o666)
    sync_tree(part) if folder else sync(part)
    part.replace(path)
    sync(path.parent)


def lock(file: int, path: Path) -> None:
    """Lock an open file, called ``path``, for this process.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    with optional("lock files, so do not start a second rq-compile that writes the same output", path.parent):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
