"""Runs the application on a port until the process is told to end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from rq_compile.errors import UserError

# Seconds that answers get to end once the server is told to end.
GRACE = 10
# Connections that wait to be accepted.
BACKLOG = 128


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host`` and ``port``; port 0 is any free one.

    Raises:
        UserError: the address is unknown or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"there is no host {host!r}; give an address of this machine with --host, such as 127.0.0.1", 2
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        wrong = (error.strerror or "it is not possible").lower()
        raise UserError(f"cannot listen on {host}:{port}: {wrong}; choose another --port or --host", 2) from error
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    host = str(listener.getsockname()[0])
    return host.startswith("127.") or host == "::1"


def run(app: Starlette, listener: socket.socket, started: Callable[[], None] = lambda: None) -> None:
    """Serve ``app`` until SIGINT or SIGTERM. No further requests are accepted then, and answers have ``GRACE`` seconds to end."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="on", server_header=False
    )
    Server(config, started).run(sockets=[listener])


class Server(uvicorn.Server):
    """``started`` is called once requests are accepted."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._tell()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising the signals again at the end, as uvicorn does: a server that was told to end has done its work."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
