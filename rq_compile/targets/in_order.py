"""Computes pieces of weights on several threads and returns them in their order."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from rq_compile.rewrite.weights import Piece, stored

Stored = list[np.ndarray]


def in_order(pieces: Iterable[Piece], threads: int, memory: int, ahead: int = 1) -> Generator[tuple[Piece, Stored]]:
    """Each piece with the bytes of its values, uint8 ``[bytes]`` for each weight.

    Pieces are started ahead of their turn while those in flight take at most ``memory`` bytes, up to ``ahead`` pieces for each
    that a thread computes; one piece is always started.
    Results do not depend on ``threads``. An exception of a piece is raised at its turn.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[Piece, Future[Stored]]] = deque()
    taken = 0
    try:
        for piece in pieces:
            while waiting and (taken + piece.memory > memory or len(waiting) >= (1 + ahead) * threads):
                first, future = waiting.popleft()
                yield first, future.result()
                taken -= first.memory
            waiting.append((piece, pool.submit(_bytes_of, piece)))
            taken += piece.memory
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _bytes_of(piece: Piece) -> Stored:
    return [stored(values, weight.dtype) for weight, values in zip(piece.weights, piece.values(), strict=True)]
