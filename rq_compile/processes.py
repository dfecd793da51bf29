"""The processes that share one calibration or compilation. This is the only module that uses torch.distributed.

They are started by ``torchrun``, or by any program that sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``. A
process that was started alone is a world of one: it owns all work and exchanges nothing.

Work is a list of items, each owned by one process. Either every process computes the same owners, or each takes the next item
when it has time. It works on its own items, and sees the results of all in the order of the list.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from rq_compile.errors import UserError, reason

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

MOST_PROCESSES = 1 << 20

# How long the processes wait until all have come.
MEETING = timedelta(minutes=5)
# How long a process then waits for another that is alive. The longest wait is for the first while it writes to a slow disk.
PATIENCE = timedelta(hours=2)


class ProcessLost(UserError):
    """Another process of the world ended early."""


def rank() -> int:
    """The number of this process among all. The first, 0, writes the outputs and prints.

    Raises:
        UserError: see ``world_size``.
    """
    return _from_environment("RANK", 0, range(world_size())) if world_size() > 1 else 0


def world_size() -> int:
    """
    Raises:
        UserError: the environment has no such number; so do all functions that ask it.
    """
    return _from_environment("WORLD_SIZE", 1, range(1, MOST_PROCESSES))


def on_this_host() -> int:
    """How many of the processes share this machine's cores and memory."""
    return _from_environment("LOCAL_WORLD_SIZE", 1, range(1, world_size() + 1)) if world_size() > 1 else 1


def device_of_process(device: str) -> str:
    """The torch device of this process: of several GPUs of a machine, each process has its own."""
    several = device == "cuda" and on_this_host() > 1
    return f"cuda:{_from_environment('LOCAL_RANK', 0, range(on_this_host()))}" if several else device


def _from_environment(name: str, default: int, allowed: range) -> int:
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdecimal() and int(value) in allowed):
        raise UserError(
            f"the environment variable {name} is {value!r}, but must be a number from {allowed.start} to {allowed.stop - 1}; "
            "unset WORLD_SIZE, or start the processes with torchrun",
            2,
        )
    return int(value)


def speaker() -> str | None:
    """How this process begins when it says what it failed at; None where it leaves that to others: before they have met, the
    first of a host speaks for all there."""
    try:
        if rank() == 0:
            return ""
        speaks = in_contact() or _from_environment("LOCAL_RANK", rank(), range(world_size())) == 0
    except UserError:
        return ""
    return f"process {rank()}: " if speaks else None


def in_contact() -> bool:
    """Whether this process has met the others, so that what it fails at now is its own."""
    return bool(world.cache_info().currsize) and world().size > 1


class World:
    """All processes, as seen by one of them."""

    def __init__(self) -> None:
        self.rank, self.size = rank(), world_size()
        self._lists = 0  # of which items were taken
        if self.size > 1:
            import torch

            devices = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                self._place, _, _ = next(torch.distributed.rendezvous("env://", timeout=MEETING))
                self._place.set(f"rq-compile/{self.rank}", "here")
                self._place.wait([f"rq-compile/{rank}" for rank in range(self.size)], MEETING)
                torch.distributed.init_process_group(
                    devices, store=self._place, rank=self.rank, world_size=self.size, timeout=PATIENCE
                )
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"the {self.size} processes of WORLD_SIZE did not meet within {MEETING.total_seconds():.0f} s: "
                    f"{reason(error)}; see what the others said, and start all with torchrun"
                ) from error

    def owners(self, costs: Iterable[float]) -> list[int]:
        """The rank that owns each item. Each item goes to the process with the least work so far, and of several to the last,
        because the first also writes."""
        work = [0.0] * self.size
        owners = []
        for cost in costs:
            owners.append(min(range(self.size), key=lambda rank: (work[rank], -rank)))
            work[owners[-1]] += float(cost)
        return owners

    def taken(self, count: int) -> Iterator[int]:
        """Numbers from 0 to ``count - 1``, in order. Each goes to the process that first asks for the next. All processes take
        from the same lists, in the same order."""
        if self.size == 1:
            yield from range(count)
            return
        self._lists += 1
        while True:
            with _or_lost():
                number = self._place.add(f"rq-compile/list {self._lists}", 1) - 1
            if number >= count:
                return
            yield number

    def takers(self, own: Sequence[int]) -> list[int]:
        """The rank of the process that has each number, where this process has its ``own``."""
        every = self.all(range(self.size), [own])
        return [rank for _, rank in sorted((number, rank) for rank, numbers in enumerate(every) for number in numbers)]

    def own(self, owners: Sequence[int], items: Iterable[T]) -> Iterator[T]:
        """Those of ``items`` that this process owns."""
        return (item for owner, item in zip(owners, items, strict=True) if owner == self.rank)

    def all(self, owners: Sequence[int], own: Iterable[T]) -> Iterator[T]:
        """Every item, in order, on every process. Each process contributes its ``own`` items.

        Raises:
            ProcessLost: another process is gone. All methods that exchange data raise this.
        """
        mine = iter(own)
        for owner in owners:
            yield self._from(owner, next(mine) if owner == self.rank else None)

    def at_first(self, owners: Sequence[int], own: Iterable[T]) -> Iterator[T]:
        """Every item, in order, on the first process. The others send their ``own`` items and get none."""
        mine = iter(own)
        for owner in owners:
            if owner == self.rank == 0:
                yield next(mine)
            elif owner == self.rank:
                self._send(next(mine), 0)
            elif self.rank == 0:
                yield self._receive(owner)

    def from_first(self, item: T) -> T:
        """The first process's ``item``."""
        return self._from(0, item)

    def sum(self, array: np.ndarray, device: str = "cpu") -> np.ndarray:
        """The sum of all processes' arrays, in place. ``device``: the device on which they are exchanged."""
        if self.size > 1:
            import torch

            # In pieces, because the array may be mapped from a file that is larger than memory.
            for part in torch.from_numpy(array).view(-1).split(1 << 24):
                with _or_lost():
                    there = part.to(device)
                    torch.distributed.all_reduce(there)
                    part.copy_(there)
        return array

    def _from(self, owner: int, item: Any) -> Any:
        box = [item]
        if self.size > 1:
            import torch

            with _or_lost():
                torch.distributed.broadcast_object_list(box, src=owner, device=torch.device("cpu"))
        return box[0]

    def ask(self, rank: int, channel: int, question: Any) -> Any:
        """On the first process: what process ``rank`` answers on ``channel``. None asks for no answer and ends its ``answer``.
        Several threads may ask at a time, each on a channel of its own."""
        self._send(question, rank, 1 + channel)
        return None if question is None else self._receive(rank, 1 + channel)

    def answer(self, channel: int, function: Callable[[Any], Any]) -> None:
        """On the others: answer the first process's questions on ``channel`` with ``function``, until it asks None."""
        while (question := self._receive(0, 1 + channel)) is not None:
            self._send(function(question), 0, 1 + channel)

    def _send(self, item: object, to: int, tag: int = 0) -> None:
        import torch

        written = io.BytesIO()
        pickle.dump(item, written, pickle.HIGHEST_PROTOCOL)  # which copies arrays once
        content = torch.frombuffer(written.getbuffer(), dtype=torch.uint8)
        with _or_lost():
            for tensor in (torch.tensor([len(content)]), content):
                torch.distributed.send(tensor, to, tag=tag)

    def _receive(self, owner: int, tag: int = 0) -> Any:
        import torch

        size = torch.empty(1, dtype=torch.int64)
        with _or_lost():
            torch.distributed.recv(size, owner, tag=tag)
            content = torch.empty(int(size), dtype=torch.uint8)
            torch.distributed.recv(content, owner, tag=tag)
        return pickle.loads(content.numpy().data)


@cache
def world() -> World:
    """All processes. The first call waits for the other processes.

    Raises:
        ProcessLost: they did not connect.
    """
    return World()


@contextmanager
def _or_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch raises this when a connection ends
        raise lost() from error


def lost() -> ProcessLost:
    return ProcessLost(
        f"one of the {world_size()} processes ended, so the others cannot continue; read its error, and start all of them again "
        "with the same command, which continues from the finished work"
    )
