"""The processes of an engine of several ranks, as seen by one of them. This is the only module that uses MPI.

The functions of ``librq_moe_mpi.so`` are called, so that no Python binding of MPI is needed. All methods of ``Ranks`` are
collective: every rank calls them, in the same order.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import pickle
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from rq_compile.engine.library import MPI_LIBRARY, library_path
from rq_compile.errors import UserError, reason

T = TypeVar("T")
# The input of a rank's graph, int64 [1]: 1 in a step in which this rank has no tokens and only computes rows of others.
IDLE = "idle"
# Where MPICH and Open MPI say which of the processes of a host this is.
LOCAL_RANK = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
ERROR_BYTES = 512
VERSION_BYTES = 8192  # MPI_MAX_LIBRARY_VERSION_STRING of MPICH; that of Open MPI is smaller
FORWARDED = 0.1  # seconds in which mpirun forwards what a rank wrote, before it learns that the rank ends all
_TAKE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64))


class Ranks:
    """``rank``: the number of this process among ``size``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        rank, size = ctypes.c_int32(), ctypes.c_int32()
        self.parted = False
        self._call("start", ctypes.byref(rank), ctypes.byref(size))
        self.rank, self.size = rank.value, size.value

    def any(self, mine: bool) -> bool:
        """Whether ``mine`` is true on any rank."""
        largest = ctypes.c_int64()
        self._call("largest", ctypes.c_int64(mine), ctypes.byref(largest))
        return bool(largest.value)

    def gather(self, mine: T) -> list[T]:
        """``mine`` of every rank, in the order of ranks; any object that can be pickled, up to 2 GiB in all."""
        sent, parts = pickle.dumps(mine), []

        @_TAKE
        def take(data: int, sizes: Any) -> None:
            start = data
            for rank in range(self.size):
                parts.append(ctypes.string_at(start, sizes[rank]))
                start += sizes[rank]

        self._call("gather", sent, ctypes.c_uint64(len(sent)), take)
        return [pickle.loads(part) for part in parts]

    def part(self) -> None:
        """Leave the others, which go on; all ranks do this at a failure that all of them have."""
        self._library.rq_ranks_finish()
        self.parted = True

    def abort(self, status: int) -> NoReturn:
        """End all ranks with the exit status ``status``; this rank calls it alone. What it wrote before is shown."""
        if not self.parted:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # the others must be ended, even if nobody reads the output any more
                    stream.flush()
            sleep(FORWARDED)
            self._library.rq_ranks_abort(status)
        sys.exit(status)

    def _call(self, name: str, *arguments: Any) -> None:
        if self.parted:
            raise UserError(f"rank {self.rank} has parted from the others after a failure; start all of them again with mpirun")
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if getattr(self._library, f"rq_ranks_{name}")(*arguments, error):
            raise UserError(
                f"the ranks lost contact: {error.value.decode(errors='replace')}; start all of them again with mpirun"
            )


def in_contact() -> bool:
    """Whether this process has met the other ranks of an engine, and is still with them."""
    return bool(ranks.cache_info().currsize) and ranks().size > 1 and not ranks().parted


def speaker() -> str | None:
    """How this process begins when it says what it failed at; None where it leaves that to others: before they have met, the
    first of a host speaks for all there."""
    if in_contact():
        return f"rank {ranks().rank}: "
    return "" if all(os.environ.get(name, "0") == "0" for name in LOCAL_RANK) else None


@cache
def ranks() -> Ranks:
    """All ranks. The first call waits for the others. An exception that nobody catches then ends all ranks.

    Raises:
        UserError: the library of the ops is missing, its MPI cannot be loaded or started, or another MPI started this process.
    """
    path = library_path(MPI_LIBRARY)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            f"cannot load {path}: {reason(error)}; install the MPI that it was built with, or build it again with make mpi-ops"
        ) from error
    _check_starter(path, library)
    met = Ranks(library)
    atexit.register(library.rq_ranks_finish)
    if met.size > 1:
        _end_all_on_failure(met)
    return met


def _check_starter(path: Path, library: ctypes.CDLL) -> None:
    """MPICH would end the process with messages of its own.

    Raises:
        UserError: MPICH is to run in a process that Open MPI's mpirun started.
    """
    version = ctypes.create_string_buffer(VERSION_BYTES)
    library.MPI_Get_library_version(version, ctypes.byref(ctypes.c_int()))
    if version.value.startswith(b"MPICH") and "OMPI_COMM_WORLD_SIZE" in os.environ:
        raise UserError(
            f"{path} was built with MPICH, but Open MPI's mpirun started this process; use the mpirun of MPICH, or build the "
            "library again with make mpi-ops",
            2,
        )


def _end_all_on_failure(met: Ranks) -> None:
    """The other ranks would wait forever for one that ended early."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown(kind, error, trace)
        met.abort(1)

    sys.excepthook = hook
