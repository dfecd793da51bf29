"""Keeps a list of an engine's files beside them while they appear one after another.

If the machine stops between two renames, the next compilation knows from this list which files it may replace, and no command
accepts new weights beside an old manifest as an engine.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from rq_compile.file_systems import sync


def list_of(output: Path) -> Path:
    """The file with the names while the files of ``output`` appear."""
    return output.with_name(f".{output.name}.files")


def left_over(output: Path) -> frozenset[str]:
    """Names of files that an interrupted compilation of ``output`` may have left; empty if it was not interrupted."""
    try:
        names = json.loads(list_of(output).read_bytes())
    except (OSError, ValueError):
        return frozenset()
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


class Appearing:
    """A context that ends when all files of ``output`` have their names. Call ``begin`` before the first file gets its name."""

    def __init__(self, output: Path) -> None:
        self._list = list_of(output)
        self._begun = False

    def __enter__(self) -> Self:
        return self

    def begin(self, names: list[str]) -> None:
        """
        Raises:
            OSError: the list cannot be written.
        """
        self._list.write_text(json.dumps(names), encoding="utf-8")
        self._begun = True
        sync(self._list)
        sync(self._list.parent)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After a failure, some files may have their names and others not.
        if self._begun and error is None:
            self._list.unlink(missing_ok=True)
