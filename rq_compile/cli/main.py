"""The ``rq-compile`` command: finds the command's module, and turns what goes wrong into one sentence and an exit code."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from rq_compile import __version__
from rq_compile.errors import UserError, printable

COMMANDS = ("compile", "calibrate", "plan", "replan", "inspect", "evaluate", "bench", "generate", "package", "report")
INTERRUPTED = 130
TERMINATED = 143


def fail(message: str, exit_status: int = 1) -> NoReturn:
    """Say ``error: message`` on stderr and leave."""
    click.echo(f"error: {printable(message)}", err=True)
    raise click.exceptions.Exit(exit_status)


class Commands(click.Group):
    """Commands loaded by name when used; a first argument that is neither command nor option is a model to compile."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _usage_in_one_line():
            return super().make_context(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"rq_compile.cli.{cmd_name}").command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            if not Path(args[0]).exists():
                close = difflib.get_close_matches(args[0], COMMANDS, 1)
                way_out = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
                fail(f"no such command or model directory: {args[0]}; {way_out}", 2)
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _usage_in_one_line():
                return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except UserError as error:
            if ctx.meta.get("debug"):
                raise
            fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if ctx.meta.get("debug") or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            fail(_sentence(error))


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """A wrong argument is told as every other error is, instead of under two lines of usage."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        message = error.format_message().rstrip(".").replace(". (", " (")
        command = error.ctx.command_path if error.ctx is not None else "rq-compile"
        fail(f"{message[0].lower()}{message[1:]}; see {command} --help", error.exit_code)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk; free space or choose another output with -o"
    reason = str(error).strip().split("\n")[0] or "no message"
    return f"{type(error).__name__}: {reason}; run with --debug for the traceback"


@click.group("rq-compile", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rq-compile")
def main() -> None:
    """Compile a sparse Mixture-of-Experts checkpoint into an engine whose experts share the load.

    \b
    rq-compile MODEL --plan plan.json -o OUT.onnx    compile
    rq-compile MODEL --text FILE -o OUT.onnx         calibrate, plan and compile in one go

    MODEL is a local Hugging Face checkpoint directory with safetensors.
    """
    # Nothing is ever fetched, and libraries must not write between our lines.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    # As Ctrl-C does, a polite kill unwinds, so that temporary files go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))


if __name__ == "__main__":
    main()
