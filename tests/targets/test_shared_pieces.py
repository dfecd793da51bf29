"""Several processes, here threads with queues between them, compute the pieces of one compilation."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from time import monotonic
from typing import Any

import numpy as np
import pytest

from rq_compile.errors import UserError
from rq_compile.rewrite.weights import ExternalWeight, Piece
from rq_compile.targets import shared_pieces
from rq_compile.targets.shared_pieces import SharedPieces
from rq_compile.targets.workers import Workers

BYTE = np.dtype(np.uint8)
DENSE = 200


class Worlds:
    """What ``World`` is for these classes, in every thread the one of its rank."""

    def __init__(self, threads: Sequence[int]) -> None:
        self.size, self.threads = len(threads), threads
        self._of_thread = threading.local()
        self._ways: dict[tuple[int, int, bool], SimpleQueue] = {}

    @property
    def rank(self) -> int:
        return getattr(self._of_thread, "rank", 0)

    def all(self, owners: Sequence[int], own: Sequence[int]) -> list[int]:
        assert list(own) == [self.threads[self.rank]]
        return list(self.threads)

    def ask(self, rank: int, channel: int, question: Any) -> Any:
        self._way(rank, channel, False).put(question)
        return None if question is None else self._way(rank, channel, True).get(timeout=10)

    def answer(self, rank: int, channel: int, function: Callable[[Any], Any]) -> None:
        while (question := self._way(rank, channel, False).get(timeout=10)) is not None:
            self._way(rank, channel, True).put(function(question))

    def _way(self, rank: int, channel: int, back: bool) -> SimpleQueue:
        return self._ways.setdefault((rank, channel, back), SimpleQueue())


class Process(threading.Thread):
    """Another process than the first. It knows the experts from the beginning, and the dense weights when ``exported`` is set."""

    def __init__(self, worlds: Worlds, rank: int, pieces: list[Piece]) -> None:
        super().__init__(daemon=True)
        self.worlds, self.rank, self.pieces, self.exported = worlds, rank, pieces, threading.Event()
        self.start()

    def run(self) -> None:
        self.worlds._of_thread.rank = self.rank
        shared = OfRank(self.worlds, self.rank)
        shared.know(self.pieces[:-1])
        with shared.for_first(self.worlds.threads[self.rank]):
            self.exported.wait(10)
            shared.know(self.pieces[-1:])


class OfRank(SharedPieces):
    """Its threads answer for this rank."""

    def __init__(self, worlds: Worlds, rank: int) -> None:
        super().__init__()
        self.worlds, self.rank = worlds, rank

    def _answer(self, channel: int, computing: threading.Semaphore) -> None:
        self.worlds.answer(self.rank, channel, partial(self._result, computing))


def pieces(computed: list[int], failing: int | None = None) -> list[Piece]:
    """Twenty of experts and a dense one; the one value of each is its number."""

    def piece(number: int) -> Piece:
        def values() -> tuple[np.ndarray, ...]:
            if number == failing:
                raise UserError("a weight is not a number", 2)
            computed.append(number)
            return (np.array([number], BYTE),)

        return Piece((ExternalWeight(str(number), BYTE, (1,)),), values, 1)

    return [*map(piece, range(20)), piece(DENSE)]


@pytest.fixture(params=[(1, 1), (2, 1, 3)], ids=str)
def worlds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Worlds:
    found = Worlds(request.param)
    monkeypatch.setattr(shared_pieces, "world", lambda: found)
    return found


def test_others_compute_before_the_first_does(worlds: Worlds) -> None:
    """Experts before the graph is known; then also what comes before them in the file."""
    on_first: list[int] = []
    on_others: list[int] = []
    own = pieces(on_first)
    others = [Process(worlds, rank, pieces(on_others)) for rank in range(1, worlds.size)]
    shared, workers = SharedPieces(), Workers(100)
    shared.know(own[:-1])
    workers.add(own[:-1])
    with shared.on_others(workers, worlds.threads[0]):
        until = monotonic() + 10
        while len(on_others) < 20 and monotonic() < until:
            threading.Event().wait(0.001)
        assert len(on_others) == 20
        shared.know(own[-1:])
        workers.add([own[-1], *own[:-1]])
        for other in others:
            other.exported.set()
        assert [int(workers.take(piece)[0][0]) for piece in (own[-1], *own[:-1])] == [DENSE, *range(20)]
    for other in others:
        other.join(10)
        assert not other.is_alive()
    assert sorted(on_others) == [*range(20), DENSE]
    assert on_first == []


def test_a_process_computes_no_more_at_a_time_than_it_has_threads(worlds: Worlds) -> None:
    """Though it answers on one channel more."""
    computing, most, changing = [0] * worlds.size, [0] * worlds.size, threading.Lock()

    def piece(rank: int, number: int) -> Piece:
        def values() -> tuple[np.ndarray, ...]:
            with changing:
                computing[rank] += 1
                most[rank] = max(most[rank], computing[rank])
            threading.Event().wait(0.01)
            with changing:
                computing[rank] -= 1
            return (np.array([number], BYTE),)

        return Piece((ExternalWeight(str(number), BYTE, (1,)),), values, 1)

    of_rank = [[piece(rank, number) for number in range(40)] for rank in range(worlds.size)]
    others = [Process(worlds, rank, of_rank[rank]) for rank in range(1, worlds.size)]
    shared, workers = SharedPieces(), Workers(100)
    shared.know(of_rank[0])
    workers.add(of_rank[0])
    for other in others:
        other.exported.set()
    with shared.on_others(workers, worlds.threads[0]):
        assert [int(workers.take(piece)[0][0]) for piece in of_rank[0]] == [*range(40)]
    assert all(0 < found <= threads for found, threads in zip(most[1:], worlds.threads[1:], strict=True))


def test_the_first_tells_what_was_wrong_elsewhere(worlds: Worlds) -> None:
    own = pieces([], failing=3)
    others = [Process(worlds, rank, pieces([], failing=3)) for rank in range(1, worlds.size)]
    shared, workers = SharedPieces(), Workers(100)
    shared.know(own[:-1])
    workers.add(own[:-1])
    with shared.on_others(workers, worlds.threads[0]), pytest.raises(UserError, match="a weight is not a number") as caught:
        list(map(workers.take, own[:-1]))
    assert caught.value.exit_status == 2
    for other in others:
        other.exported.set()
        other.join(10)
        assert not other.is_alive()
