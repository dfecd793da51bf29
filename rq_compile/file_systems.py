"""What files are given where the file system has it: syncing, permissions, locks.

Network file systems and mounted buckets lack some of it. An output is whole without, so a refusal is logged and the work goes on.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
PART = ".rq-compile."  # how names of unfinished outputs begin; short, as the output's name may have the greatest length
# How file systems say that they do not have something; what they answer to damage (EIO) or to a full disk is not here.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.ENOTTY})


def readable(name: object) -> object:
    """A name of the file system as UTF-8 text: bytes that are not UTF-8 are written as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if isinstance(name, str) else name


@contextmanager
def optional(what: str, folder: Path) -> Iterator[None]:
    """Go on if the file system of ``folder`` does not support what is done within; ``what`` completes "cannot ..."."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("the file system of %s cannot %s (%s); going on without", folder, what, error.strerror)


def sync(path: Path) -> None:
    """Have a file or folder, not what is in it, on the disk before going on.

    Raises:
        OSError: the disk failed or is full.
    """
    with optional("sync files to the disk", path if path.is_dir() else path.parent):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:
            return  # a folder that may be written into, but not listed
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """``sync`` all that is in ``folder``, then the folder."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def permit(path: Path, mode: int) -> None:
    """``mode`` less the umask, as open() and mkdir() would have it; tempfile's outputs are for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    with optional("change permissions", path.parent):
        path.chmod(mode & ~umask)


def publish(part: Path, path: Path) -> None:
    """Rename a finished file or folder: after a crash of the machine ``path`` is the old one or the whole new one.

    Raises:
        OSError: the disk is full, failed, or does not let it be renamed.
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
    with optional("lock files, so start no second rq-compile that writes the same output", path.parent):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
