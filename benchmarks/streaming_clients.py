"""Clients that stream answers of a server over HTTP. One thread runs them all, to leave the processors to the server."""

import json
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

END = b"\r\n0\r\n\r\n"  # of a chunked body


@dataclass(frozen=True)
class Asking:
    """How a server is asked. ``body(ids, most)``: for the greedy answer of ``most`` tokens to the prompt ``ids``, as a stream.
    ``tokens``: the key of an event's new tokens, a number or a list of numbers."""

    path: str
    body: Callable[[list[int], int], dict[str, Any]]
    tokens: str

    @cached_property
    def of_event(self) -> re.Pattern[bytes]:
        return re.compile(rb'"%s":(\[[0-9,]*\]|[0-9]+)' % self.tokens.encode())


@dataclass
class Times:
    """When tokens came, and how long they took: pairs of the time and the seconds."""

    tokens: list[float] = field(default_factory=list)
    first: list[tuple[float, float]] = field(default_factory=list)  # since the request
    between: list[tuple[float, float]] = field(default_factory=list)  # since the tokens before; tokens in one event count once


@dataclass
class Client:
    """Sends one request after another. ``requests``: the token ids of prompts, each with the number of tokens to ask for."""

    port: int
    asking: Asking
    requests: Iterator[tuple[list[int], int]]
    times: Times
    answered: int = 0  # requests

    def ask(self) -> socket.socket:
        prompt, self.left = next(self.requests)
        body = json.dumps(self.asking.body(prompt, self.left))
        head = f"POST {self.asking.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.connection = socket.create_connection(("127.0.0.1", self.port), 60)
        self.begun, self.last, self.held = time.perf_counter(), 0.0, b""
        self.connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return self.connection

    def read(self) -> bool:
        """Note what has arrived. Returns whether the answer has ended.

        Raises:
            ValueError: the server refused the request, or the answer has another length.
        """
        arrived = self.connection.recv(1 << 16)
        now = time.perf_counter()
        self.held += arrived
        end = 0
        for event in self.asking.of_event.finditer(self.held):
            end = event.end()
            if count := len(event[1].strip(b"[]").split(b",")) if event[1] != b"[]" else 0:
                self._note(now, count)
        ended = not arrived or self.held.endswith(END)
        if ended and self.left:
            raise ValueError(f"{self.left} tokens are missing: {self.held[-300:].decode(errors='replace')}")
        self.held = self.held[end:]
        self.answered += ended
        return ended

    def _note(self, now: float, count: int) -> None:
        self.left -= count
        self.times.tokens += [now] * count
        if self.last == 0:
            self.times.first.append((now, now - self.begun))
        else:
            self.times.between.append((now, now - self.last))
        self.last = now


def run(clients: list[Client], stop: threading.Event, failures: list[str]) -> None:
    """Let all clients ask until ``stop``, and then read their last answers to the end."""
    with selectors.DefaultSelector() as waiting:
        for client in clients:
            waiting.register(client.ask(), selectors.EVENT_READ, client)
        while waiting.get_map():
            for ready, _ in waiting.select(timeout=1):
                client = ready.data
                try:
                    if not client.read():
                        continue
                except (OSError, ValueError) as error:
                    failures.append(str(error))
                    stop.set()
                waiting.unregister(client.connection)
                client.connection.close()
                if not stop.is_set():
                    waiting.register(client.ask(), selectors.EVENT_READ, client)
