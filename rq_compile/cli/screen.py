"""What commands write: progress and remarks to stderr, the result to stdout as tables or, with --json, as JSON."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import click

from rq_compile.errors import printable
from rq_compile.processes import rank

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from rq_compile.files import Document


class Progress(Protocol):
    """Reports how much is done, and what is being done now."""

    def __call__(self, done: int, total: int, detail: str = "") -> None: ...


# Commands that several processes share, and options with which they do not. The first process does everything else alone.
SHARED = ("calibrate", "compile")
NOT_SHARED = ("data_free", "from_loads", "dry_run")
LOG_INTERVAL = 10.0  # seconds between two lines of progress without a terminal
LOG_WIDTH = 160  # columns of a table without a terminal


class Screen:
    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.muted = False

    def mute(self, rank: int) -> None:
        """Print nothing from now on, unless ``rank`` is the first of an engine's ranks."""
        if rank > 0:
            self.quiet = self.muted = click.get_current_context().meta["quiet"] = True
            self.as_json = False

    @functools.cached_property
    def _stderr(self) -> Console:
        from rich.console import Console

        return Console(stderr=True)

    def note(self, text: str) -> None:
        """One line on stderr."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def result(self, document: Document | dict[str, Any], *tables: RenderableType, asked_for: bool = True) -> None:
        """Print ``document`` as JSON with --json, otherwise the tables; ``-q`` silences a result that was not asked for."""
        if self.as_json:
            click.echo(json.dumps(json_value(document), indent=1, allow_nan=False))
        elif (asked_for and rank() == 0 and not self.muted) or not self.quiet:
            from rich.console import Console

            plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # names are shown as they are
            console = Console(**plain)
            if not console.is_terminal:
                console = Console(**plain, width=LOG_WIDTH)
            with console.capture() as capture:
                for position, table in enumerate(tables):
                    console.print(*([""] if position else []), table, sep="\n")
            # rich pads every line with spaces.
            click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))

    @contextmanager
    def progress(self, description: str, unit: str) -> Iterator[Progress]:
        """Yield a callback ``(done, total)``: a bar with rate and time left on a terminal, plain lines in a log."""
        if self.quiet:
            yield lambda done, total, detail="": None
        elif self._stderr.is_terminal:
            yield from self._bar(description, unit)
        else:
            yield from self._lines(description, unit)

    def _bar(self, description: str, unit: str) -> Iterator[Progress]:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        with Progress(*columns, console=self._stderr) as bars:
            task = bars.add_task(description, total=None, state="")
            meter = Meter(unit)

            def update(done: int, total: int, detail: str = "") -> None:
                bars.update(task, completed=done, total=total, state=meter.state(done, total, detail))

            yield update

    def _lines(self, description: str, unit: str) -> Iterator[Progress]:
        meter = Meter(unit)
        last, finished = monotonic(), False
        self.note(f"{description} ...")

        def update(done: int, total: int, detail: str = "") -> None:
            nonlocal last, finished
            state = meter.state(done, total, detail)
            # The last report may come more than once, because many small steps may round to the total.
            if (done == total and not finished) or monotonic() - last >= LOG_INTERVAL:
                last, finished = monotonic(), done == total
                self.note(f"{description}: {state}")

        yield update


def json_value(document: Document | dict[str, Any]) -> Any:
    """``document`` as JSON values. Infinities and NaN, which JSON cannot hold, become null."""
    from pydantic_core import to_jsonable_python

    data = document if isinstance(document, dict) else document.model_dump(mode="json")
    return to_jsonable_python(data, inf_nan_mode="null")


class Meter:
    """How much is done, how fast, and the time left. Rates do not include the time before the first report, such as loading."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.first: tuple[int, float] | None = None

    def state(self, done: int, total: int, detail: str = "") -> str:
        now = monotonic()
        if self.first is None:
            self.first = (done, now)
        text = f"{done}/{total} {self.unit}"
        started, start = self.first
        if done > started and now > start:
            rate = (done - started) / (now - start)
            text += f", {rate:.4g} {self.unit}/s"
            if done < total:
                text += f", {duration((total - done) / rate)} left"
        return f"{text}; {detail}" if detail else text


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def on_screen(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that every command has, and a ``Screen`` as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Print only errors and the requested result.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @click.pass_context
    @functools.wraps(function)
    def run(ctx: click.Context, /, *, as_json: bool, quiet: bool, debug: bool, **arguments: Any) -> None:
        if rank() > 0 and (ctx.command.name not in SHARED or any(arguments.get(name) for name in NOT_SHARED)):
            return
        ctx.meta["debug"], ctx.meta["quiet"] = debug, quiet or rank() > 0
        function(Screen(quiet or rank() > 0, as_json and rank() == 0), **arguments)

    return run
