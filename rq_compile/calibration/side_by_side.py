"""Experts of a layer that run side by side, with the same sums as one after the other."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

import numpy as np
import torch

from rq_compile.calibration.scratch import release

Result = TypeVar("Result")
# Experts that are run, rounded and measured at the same time, if torch has as many threads.
AT_ONCE = 2


def side_by_side(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The result of each job, in order. ``AT_ONCE`` of them run at the same time, with a share of torch's threads, so that what
    one thread does alone for one expert is beside the products of another. One thread has one expert at a time in its caches.
    The next job is made ready while they run."""
    threads = torch.get_num_threads()
    at_once = min(AT_ONCE, threads)
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
            torch.set_num_threads(threads)  # also of threads to come


class OrderedSum:
    """Adds the outputs of experts to ``output [T, hidden]`` in the order of their numbers, from 0, however they come."""

    def __init__(self, output: np.ndarray) -> None:
        self._output = output
        self._next = 0
        self._complete: dict[int, list[tuple[np.ndarray, torch.Tensor]]] = {}
        self._condition = Condition()

    def add(self, number: int, parts: list[tuple[np.ndarray, torch.Tensor]], *, complete: bool) -> None:
        """``parts``: tokens, by number, and their outputs, for some tokens of expert ``number``. With the last of them, it is
        ``complete``. Otherwise, wait until all with lower numbers are."""
        with self._condition:
            if not complete:
                self._condition.wait_for(lambda: self._next == number)
                self._add(parts)
                return
            self._complete[number] = parts
            while self._next in self._complete:
                self._add(self._complete.pop(self._next))
                self._next += 1
            self._condition.notify_all()

    def _add(self, parts: list[tuple[np.ndarray, torch.Tensor]]) -> None:
        output = torch.from_numpy(self._output)
        for tokens, outputs in parts:
            output.index_add_(0, torch.from_numpy(tokens), outputs.double())
            release(self._output)
