"""The quantizer with the kernels of another instruction set."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rq_compile.quantization import library

BUILT = library.LIBRARY


@contextmanager
def kernels_of(isa: str, file: Path = BUILT) -> Iterator[None]:
    """Let the quantizer be a copy of the library ``file``, because a library chooses its kernels once."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RQ_QUANTIZER_ISA", isa)
        patch.setattr(library, "LIBRARY", Path(shutil.copy(file, folder)))
        library.quantizer_function.cache_clear()
        try:
            yield
        finally:
            library.quantizer_function.cache_clear()
