"""Where the tokens of many answers arrive for one thread, which passes them on to their clients."""

from __future__ import annotations

from collections.abc import Hashable
from queue import Empty, SimpleQueue
from threading import Event
from time import monotonic
from typing import Generic, TypeVar

from .answer import Answer, Listener
from .sampling import Choice

Key = TypeVar("Key", bound=Hashable)
# Seconds between two messages to a client, for each client. A message takes the processor from the steps, for which all answers
# wait. With these pauses, sending takes as much of it for many clients as for few.
PACE = 0.00125
# However many clients there are: text that comes every twentieth of a second is still fluent.
LONGEST_PAUSE = 0.05
# Seconds within which the tokens of one step come.
STEP = 0.001


class Inbox(Generic[Key]):
    """Tokens that arrive while the thread is busy are taken together, so that it has less to do for each when it falls behind.
    While there are several answers, those of ``pace`` seconds times their number are taken together, but for the first and the
    last of an answer."""

    def __init__(self, pace: float = PACE) -> None:
        self._pace = pace
        self._under_way: set[Key] = set()
        self._urgent = Event()
        self._looked = 0.0
        self._arrived: SimpleQueue[tuple[Key, Answer, Choice | None] | None] = SimpleQueue()

    def listener(self, key: Key) -> Listener:
        """What ``Scheduler.submit`` tells an answer to, which is ``key`` to ``take``."""
        begun = False

        def arrive(answer: Answer, choice: Choice | None) -> None:
            nonlocal begun
            self._arrived.put((key, answer, choice))
            if not begun or choice is None:
                self._urgent.set()
            begun = True

        return arrive

    def close(self) -> None:
        """Let ``take`` return None after everything that has arrived."""
        self._arrived.put(None)
        self._urgent.set()

    def take(self, timeout: float | None = None) -> dict[Key, tuple[Answer, list[Choice | None]]] | None:
        """What has arrived since the last call, by key; the last one of an answer is None.

        Waits up to ``timeout`` seconds for the first. Returns None once the inbox is closed.
        """
        taken: dict[Key, tuple[Answer, list[Choice | None]]] = {}
        try:
            arrived = self._arrived.get(timeout=timeout)
            if (answers := len(self._under_way)) > 1:
                pause = min(self._pace * answers, LONGEST_PAUSE)
                self._urgent.wait(max(STEP, self._looked + pause - monotonic()))
            self._urgent.clear()
            self._looked = monotonic()
            while arrived is not None:
                key, answer, choice = arrived
                taken.setdefault(key, (answer, []))[1].append(choice)
                (self._under_way.discard if choice is None else self._under_way.add)(key)
                arrived = self._arrived.get_nowait()
        except Empty:
            return taken
        if taken:
            self.close()  # for the next call
        return taken or None
