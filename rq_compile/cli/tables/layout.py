"""How a table looks, and how its cells are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from rq_compile.errors import printable


class TitledTable(Table):
    """A table as wide as its cells. Longer headings wrap; the title does not. If the terminal is still narrower, cells wrap.
    Nothing is cut off."""

    def __init__(self, title: str) -> None:
        super().__init__(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        self.heading = printable(title)

    def add_row(self, *cells: Any, **options: Any) -> None:
        cells = tuple(printable(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*cells, **options)
        for column, cell in zip(self.columns, cells, strict=False):
            longest_word = max(map(len, str(column.header).split()), default=0)
            column.max_width = max(column.max_width or longest_word, len(cell))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.heading, style="bold")
        yield from super().__rich_console__(console, options)


def table(title: str, *columns: str) -> TitledTable:
    """A table whose first column is text and whose others are numbers."""
    made = TitledTable(title)
    for position, column in enumerate(columns):
        made.add_column(printable(column), justify="left" if position == 0 else "right", overflow="fold")
    return made


def facts(title: str, **values: object) -> Table:
    made = table(title, "", "")
    made.show_header = False
    made.columns[1].justify = "left"
    for name, value in values.items():
        made.add_row(name.replace("_", " "), str(value))
    return made


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def members(experts: list[int], limit: int = 6) -> str:
    shown = " ".join(map(str, experts[:limit])) + (" ..." if len(experts) > limit else "")
    return f"{len(experts)} ({shown})" if experts else "-"


def short_names(files: list[str]) -> list[str]:
    """The names up to their first dot, if that keeps them different."""
    short = [file.split(".")[0] for file in files]
    return short if len(set(short)) == len(files) and all(short) else files


def figure(value: float | None, spec: str, unit: str = "") -> str:
    return "not finite" if value is None else f"{value:{spec}}{unit}"


def change(pairs: list[tuple[float, float] | None]) -> str:
    before, after = (sum(values) / len(values) for values in zip(*(pair for pair in pairs if pair), strict=True))
    return f"{before:.3f} -> {after:.3f}"


def counts(held: Mapping[Any, int]) -> str:
    return " ".join(f"{format}:{count}" for format, count in held.items())
