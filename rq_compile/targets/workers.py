"""Computes pieces of weights ahead of their turn, on threads of this process and on other processes.

The file takes the pieces in its order. Each thread computes the first piece that none has begun, however long its last one took,
so that fast and slow threads share the work. A thread may have its pieces computed elsewhere (see ``shared_pieces``). It leaves
those to another process that this one has prepared for.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from threading import Condition, Thread

import numpy as np

from rq_compile.rewrite.weights import Piece, stored

# The bytes of a piece's values, uint8 ``[bytes]`` for each weight.
Stored = list[np.ndarray]


def compute(piece: Piece) -> Stored:
    return [stored(values, weight.dtype) for weight, values in zip(piece.weights, piece.values(), strict=True)]


class Workers:
    """Threads that compute pieces. Pieces that are computed now, and results that nobody took yet, have at most ``memory`` bytes
    together; the piece that is waited for is computed in any case. Results do not depend on the number of threads.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._changed = Condition()
        self._waiting: deque[Piece] = deque()
        self._begun: set[Piece] = set()
        self._prepared: dict[Hashable, int] = {}  # the first process that began a piece with this preparation
        self._results: dict[Piece, Stored] = {}
        self._taken = 0
        self._wanted: Piece | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._threads: list[Thread] = []

    def start(self, how: Callable[[Piece], Stored] = compute, process: int = 0) -> None:
        """Add a thread, which computes each of its pieces by ``how`` in ``process``, by rank."""
        # Daemons, because one that waits for a process that is gone must not keep this one.
        self._threads.append(Thread(target=self._run, args=(how, process), daemon=True))
        self._threads[-1].start()

    def add(self, pieces: Iterable[Piece]) -> None:
        """Compute ``pieces`` in this order, before all others that were added. Those that were begun are not computed again."""
        with self._changed:
            first = [piece for piece in pieces if piece not in self._begun]
            others = set(self._waiting).difference(first)
            self._waiting = deque([*first, *(piece for piece in self._waiting if piece in others)])
            self._changed.notify_all()

    def take(self, piece: Piece) -> Stored:
        """The result of a piece that was added; it is not kept. Pieces must be taken in the order in which they were added.

        Raises:
            Exception: what any piece raised. No further piece is then begun.
        """
        with self._changed:
            self._wanted = piece
            self._changed.notify_all()
            self._changed.wait_for(lambda: piece in self._results or self._error)
            if self._error and piece not in self._results:
                raise self._error
            result = self._results.pop(piece)
            self._begun.discard(piece)
            self._taken -= _bytes(result)
            self._changed.notify_all()
        return result

    def close(self) -> None:
        """Begin no further piece, and wait for those that are computed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, how: Callable[[Piece], Stored], process: int) -> None:
        while (piece := self._next(process)) is not None:
            try:
                result = how(piece)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                self._results[piece] = result
                self._taken += _bytes(result) - piece.memory
                self._changed.notify_all()

    def _next(self, process: int) -> Piece | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._error or self._choice(process))
            if self._closed or self._error:
                return None
            piece = self._choice(process)
            assert piece is not None
            self._waiting.remove(piece)
            self._begun.add(piece)
            if piece.preparation is not None:
                self._prepared.setdefault(piece.preparation, process)
            self._taken += piece.memory
            return piece

    def _choice(self, process: int) -> Piece | None:
        """The piece to begin in ``process``: the first that no other has prepared for, or else the first. None if there is no
        room for it now."""
        if not self._waiting:
            return None
        first = self._waiting[0]
        own = next((piece for piece in self._waiting if self._prepared.get(piece.preparation, process) == process), first)
        return next((piece for piece in (own, first) if self._may_begin(piece)), None)

    def _may_begin(self, piece: Piece) -> bool:
        return piece is self._wanted or self._taken + piece.memory <= self._memory


def _bytes(result: Stored) -> int:
    return sum(map(len, result))
