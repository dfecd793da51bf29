"""Where the tokens of many answers arrive for one thread, which passes them on to their clients."""

from __future__ import annotations

from collections.abc import Hashable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from .sampling import Choice
from .scheduler import Answer, Listener

Key = TypeVar("Key", bound=Hashable)


class Inbox(Generic[Key]):
    """Tokens that arrive while the thread is busy are taken together, so that it has less to do for each when it falls behind."""

    def __init__(self) -> None:
        self._arrived: SimpleQueue[tuple[Key, Answer, Choice | None] | None] = SimpleQueue()

    def listener(self, key: Key) -> Listener:
        """What ``Scheduler.submit`` tells an answer to, which is ``key`` to ``take``."""
        return lambda answer, choice: self._arrived.put((key, answer, choice))

    def close(self) -> None:
        """Let ``take`` return None after everything that has arrived."""
        self._arrived.put(None)

    def take(self, timeout: float | None = None) -> dict[Key, tuple[Answer, list[Choice | None]]] | None:
        """What has arrived since the last call, by key; the last one of an answer is None.

        Waits up to ``timeout`` seconds for the first. Returns None once the inbox is closed.
        """
        taken: dict[Key, tuple[Answer, list[Choice | None]]] = {}
        try:
            arrived = self._arrived.get(timeout=timeout)
            while arrived is not None:
                key, answer, choice = arrived
                taken.setdefault(key, (answer, []))[1].append(choice)
                arrived = self._arrived.get_nowait()
        except Empty:
            return taken
        if taken:
            self.close()  # for the next call
        return taken or None
