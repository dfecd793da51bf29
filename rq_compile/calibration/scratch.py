"""Working arrays that may be larger than memory, and memory that is not needed any more."""

import ctypes
import math
import mmap
import os
import sys

import numpy as np

from rq_compile import spill
from rq_compile.errors import UserError
from rq_compile.file_systems import optional

# Of glibc's malloc.h: ``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD``.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Bytes. Smaller arrays, such as the weights of most experts in 16 bits, come too often to be handed out by the system.
LARGE_ARRAY = 16 << 20
# Bytes of freed smaller arrays that a thread keeps for later ones, until ``return_freed``.
KEPT = 64 << 20


def scratch(shape: tuple[int, ...], in_memory: bool, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """An array of zeros: in memory, or mapped from an unnamed file that disappears with the array, however the process ends.

    Raises:
        UserError: the disk is too small.
    """
    size = np.dtype(dtype).itemsize * math.prod(shape)
    if in_memory or not size:
        return np.zeros(shape, dtype)
    try:
        with spill.unnamed_file() as file:
            file.truncate(size)
            if sys.platform == "linux":
                with optional("reserve room in files", spill.folder()):
                    os.posix_fallocate(file.fileno(), 0, size)  # reports a full disk here, not as a bus error of a later write
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise UserError(
            f"cannot keep {size / 2**30:.1f} GiB of hidden states in {spill.folder()}: {error.strerror}; "
            "free space there or name another folder in TMPDIR"
        ) from error


def release(array: np.ndarray) -> None:
    """Let the system evict the resident pages of a mapped array when it needs the memory."""
    if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def return_freed() -> None:
    """Return the memory of freed arrays to the system. glibc keeps what lies between arrays in use; without this, a process grows
    from layer to layer. Does nothing with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_large_arrays_when_freed() -> None:
    """From now on, let this process return the memory of every large array as soon as the array is freed, keep that of smaller
    ones, and let torch have huge pages.

    By default, glibc returns large arrays at first, but after a few of them keeps up to 32 MiB of each for later ones, in every
    thread. With a fixed limit for large arrays, it returns smaller ones, too, if they end a heap, and the system would clear the
    same memory again and again. These settings are for a process as a whole, so only the program makes them, not the Python API.
    Those of glibc do nothing with another C library.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        set_option(MMAP_THRESHOLD, LARGE_ARRAY)
        set_option(TRIM_THRESHOLD, KEPT)


def on_disk(array: np.ndarray) -> np.ndarray:
    """An fp32 array moved into an unnamed file."""
    mapped = scratch(array.shape, in_memory=False)
    mapped[...] = array
    release(mapped)
    return mapped
