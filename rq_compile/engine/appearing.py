"""While an engine's files appear one after the other, a list of their names lies beside them.

After a stop of the machine between two renames the next compilation knows by it what it may replace, and no command takes new
weights beside an old manifest for an engine.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from rq_compile.file_systems import sync


def list_of(output: Path) -> Path:
    """Where the names are while the files of ``output`` appear."""
    return output.with_name(f".{output.name}.files")


def left_over(output: Path) -> frozenset[str]:
    """Names of files that a compilation of ``output`` may have left when it was stopped; none where it was not."""
    try:
        names = json.loads(list_of(output).read_bytes())
    except (OSError, ValueError):
        return frozenset()
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


class Appearing:
    """To be left after all files of ``output`` have their names; ``begin`` comes before the first has."""

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
        # After a failure some files may have their names, others not.
        if self._begun and error is None:
            self._list.unlink(missing_ok=True)
