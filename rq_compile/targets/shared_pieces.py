"""Several processes compute the pieces of one compilation. The first asks the others for pieces, as its workers come to them.

All know the pieces by the same numbers. Those of experts depend only on plan and checkpoint, so that the other processes compute
them while the first exports the graph.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Condition, Semaphore, Thread
from typing import Any

from rq_compile.processes import ProcessLost, world
from rq_compile.rewrite.weights import Piece
from rq_compile.targets.workers import Stored, Workers, compute


class SharedPieces:
    """The numbers of pieces; ``know`` gives them, on every process in the same order."""

    def __init__(self) -> None:
        self._numbers: dict[Piece, int] = {}
        self._pieces: list[Piece] = []
        self._more = Condition()

    def know(self, pieces: Iterable[Piece]) -> None:
        """Number the ``pieces`` that have no number yet."""
        with self._more:
            for piece in pieces:
                if piece not in self._numbers:
                    self._numbers[piece] = len(self._pieces)
                    self._pieces.append(piece)
            self._more.notify_all()

    @contextmanager
    def on_others(self, workers: Workers, threads: int) -> Iterator[None]:
        """On the first process, which has ``threads`` itself: ``workers`` also have pieces computed by the other processes."""
        channels = self._channels(threads)
        for rank, channel in channels:
            workers.start(self._asking(rank, channel), rank)
        try:
            yield
        finally:
            workers.close()
            with suppress(ProcessLost):
                for rank, channel in channels:
                    world().ask(rank, channel, None)

    @contextmanager
    def for_first(self, threads: int) -> Iterator[None]:
        """On the others: compute on ``threads`` threads what the first process asks for, until it needs no more pieces."""
        own = [channel for rank, channel in self._channels(threads) if rank == world().rank]
        computing = Semaphore(threads)
        answering = [Thread(target=self._answer, args=(channel, computing), daemon=True) for channel in own]
        for thread in answering:
            thread.start()
        yield
        for thread in answering:
            thread.join()

    def _channels(self, threads: int) -> list[tuple[int, int]]:
        """The rank and channel of every thread that answers. A process has one more than compute at a time: while the others
        compute, it sends a result and is asked for the next piece."""
        by_rank = world().all(range(world().size), [threads])
        return [(rank, channel) for rank, count in enumerate(by_rank) if rank for channel in range(count + 1)]

    def _asking(self, rank: int, channel: int) -> Callable[[Piece], Stored]:
        def asked(piece: Piece) -> Stored:
            answer = world().ask(rank, channel, self._numbers[piece])
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return asked

    def _answer(self, channel: int, computing: Semaphore) -> None:
        with suppress(ProcessLost):  # which the main thread learns, too
            world().answer(channel, partial(self._result, computing))

    def _result(self, computing: Semaphore, number: int) -> Any:
        """The result of a piece, or its error, which the first process tells."""
        with self._more:
            self._more.wait_for(lambda: number < len(self._pieces))
        try:
            with computing:
                return compute(self._pieces[number])
        except Exception as error:
            return error
