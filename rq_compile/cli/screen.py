"""What commands write: progress and remarks to stderr, the result to stdout as tables or, with --json, as JSON."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from rq_compile.files import Document

Progress = Callable[[int, int], None]
LOG_INTERVAL = 10.0  # seconds between two plain lines
LOG_WIDTH = 160  # columns of a table that no terminal bounds


class Screen:
    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet = quiet
        self.as_json = as_json

    @functools.cached_property
    def _stderr(self) -> Console:
        from rich.console import Console

        return Console(stderr=True)

    def note(self, text: str) -> None:
        """One line on stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    def result(self, document: Document | dict[str, Any], *tables: RenderableType, asked_for: bool = True) -> None:
        """Print ``document`` as JSON with --json, else the tables; ``-q`` silences a result that was not asked for."""
        if self.as_json:
            data = document if isinstance(document, dict) else document.model_dump(mode="json")
            click.echo(json.dumps(data, indent=1))
        elif asked_for or not self.quiet:
            from rich.console import Console

            console = Console()
            if not console.is_terminal:
                console = Console(width=LOG_WIDTH)
            for table in tables:
                console.print(table)

    @contextmanager
    def progress(self, description: str, unit: str) -> Iterator[Progress]:
        """Yield a callback ``(done, total)``: a bar with rate and time left on a terminal, plain lines in a log."""
        if self.quiet:
            yield lambda done, total: None
        elif self._stderr.is_terminal:
            yield from self._bar(description, unit)
        else:
            yield from self._lines(description, unit)

    def _bar(self, description: str, unit: str) -> Iterator[Progress]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}, {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._stderr) as bars:
            task = bars.add_task(description, total=1, unit=unit, rate="")
            start = monotonic()

            def update(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total, rate=rate(done, monotonic() - start, unit))

            yield update

    def _lines(self, description: str, unit: str) -> Iterator[Progress]:
        start = monotonic()
        last = start
        self.note(f"{description} ...")

        def update(done: int, total: int) -> None:
            nonlocal last
            now = monotonic()
            if done < total and now - last < LOG_INTERVAL:
                return
            last = now
            left = f", {(total - done) * (now - start) / done:.0f} s left" if 0 < done < total else ""
            self.note(f"{description}: {done}/{total} {unit}, {rate(done, now - start, unit)}{left}")

        yield update


def rate(done: int, seconds: float, unit: str) -> str:
    return f"{done / max(seconds, 1e-9):.4g} {unit}/s"


def on_screen(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options every command has, and a ``Screen`` as first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and the result asked for.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @click.pass_context
    @functools.wraps(function)
    def run(ctx: click.Context, /, *, as_json: bool, quiet: bool, debug: bool, **arguments: Any) -> None:
        ctx.meta["debug"] = debug
        function(Screen(quiet, as_json), **arguments)

    return run
