"""The ``rq-compile`` command: finds the command's module, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import codecs
import difflib
import errno
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any, NoReturn

import click

from rq_compile import __version__
from rq_compile.cli.leaving import leave
from rq_compile.engine import ranks
from rq_compile.errors import UserError, printable, reason
from rq_compile.processes import in_contact, lost, on_this_host, rank, speaker
from rq_compile.standalone.limits import default_threads, restricted

COMMANDS = (
    "compile",
    "calibrate",
    "merge",
    "plan",
    "replan",
    "inspect",
    "evaluate",
    "bench",
    "generate",
    "chat",
    "serve",
    "package",
    "report",
)
OWN_OPTIONS = ("-h", "--help", "--version")
INTERRUPTED = 130
TERMINATED = 143
FIRST_SPEAKS = 0.5  # seconds


def fail(message: str, exit_status: int = 1) -> NoReturn:
    """Print ``error: message`` to stderr and exit. With several processes, each prints only its own errors."""
    if in_contact():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all processes when one has failed
    if ranks.in_contact() and ranks.ranks().rank > 0:
        sleep(FIRST_SPEAKS)  # what all ranks fail at, the first says, and ends the others
    if (of := speaker()) is not None and (of_rank := ranks.speaker()) is not None:
        click.echo(f"error: {of}{of_rank}{printable(message)}", err=True)
    end_ranks(exit_status)
    raise click.exceptions.Exit(exit_status)


def end_ranks(exit_status: int) -> None:
    """End the other ranks of an engine, which would wait for this one."""
    if ranks.in_contact():
        ranks.ranks().abort(exit_status)


class Commands(click.Group):
    """Loads a command's module when the command is used. Without a command name, the command is ``compile``."""

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
        if args and args[0] not in (*COMMANDS, *OWN_OPTIONS):
            check_model_given(args, ctx)
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
        except ModuleNotFoundError as error:
            if ctx.meta.get("debug") or (error.name or "").startswith("rq_compile"):
                raise
            fail(
                f"{ctx.invoked_subcommand} needs {error.name}, which a plain install does not include; "
                "run pip install '.[compile]' in the folder of rq-compile's sources"
            )
        except KeyboardInterrupt:
            if rank() == 0:
                click.echo("interrupted", err=True)
            end_ranks(INTERRUPTED)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if ctx.meta.get("debug") or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            fail(_sentence(error))


def check_model_given(args: list[str], ctx: click.Context) -> None:
    """Find MODEL in arguments that do not begin with a command. MODEL may follow options.

    Raises:
        Exit: the argument found is a command, or neither a command nor a folder.
    """
    model = args[0]
    if model.startswith("-"):
        compiling = importlib.import_module("rq_compile.cli.compile").command
        given, _, _ = compiling.make_parser(click.Context(compiling, ctx, info_name="compile")).parse_args(list(args))
        model = given.get("folder")
        if not isinstance(model, str):
            return  # the compile command says what is missing
        if model in COMMANDS and not Path(model).exists():
            fail(f"{args[0]} is placed before the command {model}; write rq-compile {model} ... {args[0]} ...", 2)
    if not Path(model).exists():
        close = difflib.get_close_matches(model, COMMANDS, 1)
        way_out = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        fail(f"no such command or model directory: {model}; {way_out}", 2)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """Report a wrong argument in one line, as every other error, instead of after two lines of usage."""
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
    return f"{type(error).__name__}: {reason(error)}; run with --debug for the traceback"


@click.group("rq-compile", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rq-compile")
def main() -> None:
    """Compile a sparse Mixture-of-Experts checkpoint into an engine with balanced experts.

    \b
    rq-compile MODEL --plan plan.json -o OUT.onnx    compile
    rq-compile MODEL --text FILE -o OUT.onnx         calibrate, plan and compile

    MODEL is a local Hugging Face checkpoint directory with safetensors files.
    """
    # Nothing is ever downloaded, and libraries must not write between our lines.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    use_what_is_allowed()
    context = click.get_current_context()
    context.with_resource(log_shown(context))
    # SIGTERM unwinds the stack as Ctrl-C does, so that temporary files are removed.
    signal.signal(signal.SIGTERM, end)


def end(*_: object) -> NoReturn:
    if in_contact():
        raise lost()
    end_ranks(TERMINATED)
    sys.exit(TERMINATED)


def use_what_is_allowed() -> None:
    """Limit libraries that choose their number of threads by the CPUs of the machine and ignore quotas."""
    if restricted() or on_this_host() > 1:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ.setdefault(name, str(max(1, default_threads() // on_this_host())))


@contextmanager
def log_shown(context: click.Context) -> Iterator[None]:
    """While the command runs, print what the package logs as lines on stderr, each line once."""
    log = logging.getLogger("rq_compile")
    before = log.handlers, log.level, log.propagate
    log.handlers, log.level, log.propagate = [Lines(context)], logging.INFO, False
    try:
        yield
    finally:
        log.handlers, log.level, log.propagate = before


class Lines(logging.Handler):
    def __init__(self, context: click.Context) -> None:
        super().__init__()
        self.context = context
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.shown and not self.context.meta.get("quiet"):
            self.shown.add(text)
            click.echo(printable(text), err=True)


def run() -> None:
    """The entry point of the process.

    In a locale without UTF-8, names of files and prompts could not be decoded, and results could not be written. Python switches
    to its UTF-8 mode in an ASCII locale, unless this is disabled, and never does in other encodings such as Latin-1.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8" and sys.executable and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name that is not UTF-8 is written as it is
    try:
        main()
    except SystemExit as end_of_command:
        if isinstance(end_of_command.code, int):
            leave(end_of_command.code)
        raise


if __name__ == "__main__":
    run()
