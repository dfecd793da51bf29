"""Workers compute pieces ahead of their turn, within their memory, and end when one of them fails."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from rq_compile.errors import UserError
from rq_compile.rewrite.weights import ExternalWeight, Piece
from rq_compile.targets.workers import Workers, compute

BYTE = np.dtype(np.uint8)


def piece(number: int, memory: int = 1, before: Callable[[], object] = lambda: None, preparation: str | None = None) -> Piece:
    """Its one value is ``number``."""
    weight = ExternalWeight(str(number), BYTE, (1,))

    def values() -> tuple[np.ndarray, ...]:
        before()
        return (np.array([number], BYTE),)

    return Piece((weight,), values, memory, preparation)


def taken(workers: Workers, pieces: list[Piece]) -> list[int]:
    return [int(workers.take(piece)[0][0]) for piece in pieces]


@contextmanager
def working(threads: int, memory: int) -> Iterator[Workers]:
    """All threads have ended afterwards."""
    before, workers = set(threading.enumerate()), Workers(memory)
    for _ in range(threads):
        workers.start()
    try:
        yield workers
    finally:
        workers.close()
    assert set(threading.enumerate()) == before


def test_pieces_are_computed_at_once_and_come_in_order() -> None:
    both = threading.Barrier(2, timeout=10)
    pieces = [piece(number, before=both.wait) for number in range(6)]
    with working(2, 100) as workers:
        workers.add(pieces)
        assert taken(workers, pieces) == list(range(6))


@pytest.mark.parametrize("late", [0, 1])
def test_what_is_added_later_is_wanted_first(late: int) -> None:
    """Experts are begun before the graph is known, whose other weights come before them in the file. ``late``: threads that start
    after that."""
    order: list[int] = []
    pieces = [piece(number, before=partial(order.append, number)) for number in range(20)]
    later = [piece(number, before=partial(order.append, number)) for number in range(100, 103)]
    # With the memory of three pieces or results, the rest waits.
    with working(1 - late, 3) as workers:
        workers.add(pieces)
        if not late:
            while len(order) < 3:
                threading.Event().wait(0.001)
        workers.add([*later, *pieces])
        for _ in range(late):
            workers.start()
        assert taken(workers, [*later, *pieces]) == [100, 101, 102, *range(20)]
    assert order == ([100, 101, 102, *range(20)] if late else [0, 1, 2, 100, 101, 102, *range(3, 20)])


@pytest.mark.parametrize("memory", [100, 2], ids=["with room for all", "with room for two"])
def test_a_process_leaves_what_another_has_prepared_for_to_that(memory: int) -> None:
    """Until nothing else is left, or its room is used up and the file waits."""
    begun, go = threading.Event(), threading.Event()
    orders: tuple[list[int], list[int]] = ([], [])
    pieces = [piece(number, preparation="moment" if number < 4 else None) for number in range(6)]

    def computed(process: int, each: Piece) -> list[np.ndarray]:
        orders[process].append(pieces.index(each))
        if process == 1:
            begun.set()
            assert go.wait(10)
        return compute(each)

    with working(0, memory) as workers:
        workers.add(pieces)
        workers.start(partial(computed, 1), 1)
        assert begun.wait(10)
        workers.start(partial(computed, 0), 0)
        while len(orders[0]) < min(5, memory - 1):
            threading.Event().wait(0.001)
        threading.Event().wait(0.05)  # in which it could begin more
        assert orders == (([4, 5, 1, 2, 3], [0]) if memory > 2 else ([4], [0]))
        go.set()
        assert taken(workers, pieces) == list(range(6))
    assert sorted(orders[0] + orders[1]) == list(range(6))


def test_one_process_prepares_in_the_order_of_the_file() -> None:
    order: list[int] = []
    pieces = [piece(number, 1, partial(order.append, number), "ab"[number % 2]) for number in range(6)]
    with working(1, 100) as workers:
        workers.add(pieces)
        assert taken(workers, pieces) == order == list(range(6))


def test_pieces_and_results_keep_to_the_memory() -> None:
    """But for the piece that is waited for. A result takes as much as its piece."""
    held: list[int] = []
    most = 0

    def sized(number: int, memory: int) -> Piece:
        def values() -> tuple[np.ndarray, ...]:
            nonlocal most
            held.append(memory)
            most = max(most, sum(held))
            return (np.zeros(memory, BYTE),)

        return Piece((ExternalWeight(str(number), BYTE, (memory,)),), values, memory)

    def take_all(workers: Workers, pieces: list[Piece]) -> None:
        for each in pieces:
            workers.take(each)
            held.remove(each.memory)

    pieces = [sized(number, 30) for number in range(20)]
    with working(8, 100) as workers:
        workers.add(pieces)
        while sum(held) < 90:
            threading.Event().wait(0.001)
        threading.Event().wait(0.05)  # in which the other threads could begin more
        assert (sum(held), most) == (90, 90)
        take_all(workers, pieces)
    most = 0
    large = [sized(number, memory) for number, memory in enumerate((30, 1000, 30))]
    with working(8, 100) as workers:
        workers.add(large)
        while not held:
            threading.Event().wait(0.001)
        threading.Event().wait(0.05)
        assert held == [30]  # nobody waits for the large one yet
        take_all(workers, large)


def test_an_error_of_a_piece_ends_the_work() -> None:
    """Also while pieces are waited for that come before it in the file, but were added later."""

    def fail() -> None:
        raise UserError("a weight is not a number")

    failing, later = piece(0, before=fail), [piece(number) for number in range(1, 9)]
    with working(2, 1000) as workers:
        workers.add([failing])
        workers.add([*later, failing])
        with pytest.raises(UserError, match="not a number"):
            taken(workers, [*later, failing])


def test_a_thread_may_compute_elsewhere() -> None:
    elsewhere: list[Piece] = []

    def asked(piece: Piece) -> list[np.ndarray]:
        elsewhere.append(piece)
        return compute(piece)

    pieces = [piece(number) for number in range(6)]
    with working(0, 100) as workers:
        workers.start(asked)
        workers.add(pieces)
        assert taken(workers, pieces) == list(range(6))
    assert elsewhere == pieces
