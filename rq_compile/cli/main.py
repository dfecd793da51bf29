"""The ``rq-compile`` command: finds the command's module, and turns what goes wrong into one sentence and an exit code."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from pathlib import Path
from typing import IO, Any

import click

from rq_compile import __version__
from rq_compile.errors import UserError

COMMANDS = ("compile", "calibrate", "plan", "inspect", "evaluate", "bench", "generate")
INTERRUPTED = 130


class Failure(click.ClickException):
    """Shown as ``error: message`` on stderr."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_status

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)


class Commands(click.Group):
    """Commands loaded by name when used; a first argument that is neither command nor option is a model to compile."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"rq_compile.cli.{cmd_name}").command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            if close and not Path(args[0]).exists():
                raise click.UsageError(f"no such command or model directory: {args[0]}; did you mean {close[0]}?", ctx)
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except UserError as error:
            if ctx.meta.get("debug"):
                raise
            raise Failure(str(error), error.exit_status) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if ctx.meta.get("debug") or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            raise Failure(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk; free space or choose another output with -o"
    reason = str(error).strip().split("\n")[0] or "no message"
    return f"{type(error).__name__}: {reason}; run with --debug for the traceback"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
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


if __name__ == "__main__":
    main()
