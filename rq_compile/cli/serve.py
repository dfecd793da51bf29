"""``rq-compile serve``: an HTTP server with the endpoints of OpenAI's API."""

from __future__ import annotations

from pathlib import Path

import click

import rq_compile as rq
from rq_compile.cli.options import FILE, threads_option
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError


@click.command("serve")
@click.argument("engine", type=FILE)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0: any free one.")
@click.option("--served-model-name", help="The model's name for clients. Default: the engine's name.")
@click.option("--slots", type=click.IntRange(1, 1024), default=8, show_default=True, help="Answers that share every step.")
@click.option("--max-length", type=click.IntRange(2), help="Tokens of a prompt with its answer. Default: the context length.")
@click.option("--max-waiting", type=click.IntRange(0, 10_000), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--enable-prefix-caching/--no-enable-prefix-caching",
    "reuse_prefixes",
    default=True,
    show_default=True,
    help="Read only the new tokens of a conversation that goes on.",
)
@threads_option
@on_screen
def command(
    screen: Screen,
    engine: Path,
    host: str,
    port: int,
    served_model_name: str | None,
    slots: int,
    max_length: int | None,
    max_waiting: int,
    reuse_prefixes: bool,
    threads: int | None,
) -> None:
    """Serve ENGINE over HTTP with OpenAI's API.

    The endpoints are /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics.

    There is no authentication, so the server listens on this machine only, unless --host says otherwise. It ends on Ctrl-C or
    SIGTERM.
    """
    try:
        from rq_compile.serving.app import application
        from rq_compile.serving.served_model import ServedModel
        from rq_compile.serving.server import is_local, listening, run, url
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(
            f"serve needs {error.name}, which is not installed; run pip install '.[serve]' in the sources", 2
        ) from error

    from rq_compile.runtime.files import check_one_process

    check_one_process(engine, "serve")
    with listening(host, port) as listener:
        name = served_model_name or engine.stem
        model = ServedModel(
            rq.load(engine, threads),
            name,
            slots=slots,
            max_length=max_length,
            max_waiting=max_waiting,
            reuse_prefixes=reuse_prefixes,
        )
        if not is_local(listener):
            screen.note(f"everyone who can reach {url(listener)} can use the model, because there is no authentication")
        if model.engine.chat_template is None:
            screen.note(f"{engine} has no chat template: /v1/chat/completions is refused, and /v1/completions works")
        said = (
            f"serving {name} on {url(listener)}: {slots} slots of up to {model.scheduler.max_length} tokens; end it with Ctrl-C"
        )
        run(application(model), listener, lambda: screen.note(said))
    screen.note("the server has ended")
