"""The weights file of an engine. The place of every weight is known before any is read, and the file is written from front to
back.

After an interruption, the file is therefore a prefix of the complete file, and can be continued.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

from rq_compile.engine.manifest import EngineFile
from rq_compile.processes import on_this_host
from rq_compile.rewrite.weights import (
    ExternalWeight,
    Piece,
    Section,
    external_name,
    external_offset,
    external_tensors,
    stored_bytes,
)
from rq_compile.standalone.limits import usable_cpus
from rq_compile.targets.partial_file import Journal, Record
from rq_compile.targets.workers import Stored, Workers

ALIGNMENT = 4096  # a page, so that each weight can be mapped into memory separately
MEMORY = 1 << 30
READ_AT_ONCE = 1 << 24
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Layout:
    """The start of each weight, by name, and the end of each section. A section begins where the previous one ends."""

    starts: dict[str, int]
    ends: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.ends[-1] if self.ends else 0


@dataclass(frozen=True)
class WeightsFile:
    """The start of each weight, by name; the file's length in bytes and its sha256; the number of bytes that existed before."""

    starts: dict[str, int]
    bytes: int
    sha256: str
    resumed: int

    def described(self, path: Path) -> EngineFile:
        return EngineFile(name=path.name, sha256=self.sha256, bytes=self.bytes)


def layout(sections: Iterable[Section]) -> Layout:
    """Every weight at a multiple of ``ALIGNMENT``, in order."""
    starts, ends, end = {}, [], 0
    for section in sections:
        for weight in section.weights:
            starts[weight.name] = end + -end % ALIGNMENT
            end = starts[weight.name] + weight.bytes
        ends.append(end)
    return Layout(starts, tuple(ends))


def write_weights(
    sections: Iterable[Section],
    file: BinaryIO,
    progress: Progress | None = None,
    *,
    threads: int | None = None,
    memory: int = MEMORY,
    journal: Journal | None = None,
    workers: Workers | None = None,
) -> WeightsFile:
    """Write ``sections`` in order, computed by ``workers``, or else on ``threads`` threads (by default see ``threads_here``)
    within ``memory`` bytes.

    Sections that are in ``file`` according to ``journal`` are verified, and computed again from the first that differs.
    ``progress(done, total)`` is called in bytes, after each write.

    Raises:
        ValueError: the pieces of a weight do not add up to its shape.
        OSError: the disk is full or the file cannot be written.
    """
    sections = list(sections)
    places = layout(sections)
    writer = _Writer(file)
    found = _verified(sections, places, writer, journal) if journal else 0
    resumed = writer.position
    file.seek(resumed)
    file.truncate()
    pieces = [piece for section in sections[found:] for piece in section.pieces]
    with _workers(threads, memory) if workers is None else nullcontext(workers) as workers:
        workers.add(pieces)
        computed = ((piece, workers.take(piece)) for piece in pieces)
        for section, end in zip(sections[found:], places.ends[found:], strict=True):
            for weight, data in _by_weight(section, islice(computed, len(section.pieces))):
                writer.fill_up(places.starts[weight.name])
                writer.put(data)
                if progress:
                    progress(writer.position, places.bytes)
            if journal:
                file.flush()
                journal.add(Record(section=section.name, end=end, sha256=writer.whole.hexdigest()))
    return WeightsFile(places.starts, places.bytes, writer.whole.hexdigest(), resumed)


def threads_here(threads: int | None = None) -> int:
    """``threads``, by default one for each usable CPU, of which each process of this host has its share."""
    return threads or max(1, usable_cpus() // on_this_host())


@contextmanager
def _workers(threads: int | None, memory: int) -> Iterator[Workers]:
    workers = Workers(memory)
    for _ in range(threads_here(threads)):
        workers.start()
    try:
        yield workers
    finally:  # no thread continues to compute after a failed write
        workers.close()


class _Writer:
    """The current end of the file, and the hash of everything before it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.position = 0
        self.whole = hashlib.sha256()

    def put(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.took(data)

    def took(self, data: bytes | memoryview) -> None:
        self.whole.update(data)
        self.position += len(data)

    def fill_up(self, start: int) -> None:
        if start > self.position:
            self.put(bytes(start - self.position))


def _by_weight(section: Section, computed: Iterator[tuple[Piece, Stored]]) -> Iterator[tuple[ExternalWeight, memoryview]]:
    """The bytes of the section's weights, one weight after another. Bytes that come before their turn (scales) are kept."""
    early: dict[str, list[memoryview]] = {weight.name: [] for weight in section.weights}
    missing = {weight.name: weight.bytes for weight in section.weights}
    turns = list(section.weights)
    for piece, arrays in computed:
        for weight, data in zip(piece.weights, arrays, strict=True):
            early[weight.name].append(data.data)
            missing[weight.name] -= len(data)
        while turns:
            ready, early[turns[0].name] = early[turns[0].name], []
            yield from ((turns[0], data) for data in ready)
            if missing[turns[0].name] > 0:
                break
            del turns[0]
    for weight in section.weights:
        if missing[weight.name]:
            size = weight.bytes - missing[weight.name]
            raise ValueError(f"{weight.name} has {size} bytes, but its shape {weight.shape} needs {weight.bytes}")


def _verified(sections: Sequence[Section], places: Layout, writer: _Writer, journal: Journal) -> int:
    """The number of sections at the beginning of the file that agree with the journal. ``writer`` is moved behind them."""
    for number, record in enumerate(journal.records[: len(sections)]):
        if (record.section, record.end) != (sections[number].name, places.ends[number]):
            journal.distrust(number)
            return number
        before, start = writer.whole.copy(), writer.position
        writer.file.seek(start)
        while writer.position < record.end and (data := writer.file.read(min(READ_AT_ONCE, record.end - writer.position))):
            writer.took(data)
        if writer.whole.hexdigest() != record.sha256:
            writer.whole, writer.position = before, start
            journal.distrust(number)
            return number
    return min(len(journal.records), len(sections))


def locate(
    model: onnx.ModelProto, starts: Mapping[str, int], file_name: str, elsewhere: Mapping[str, tuple[str, int]] | None = None
) -> None:
    """Point every external tensor of ``model`` to its bytes in ``file_name``. ``starts``: the start of each weight in this file.

    ``elsewhere``: the file names and starts of weights that are in other files.
    """
    places = {name: (file_name, start) for name, start in starts.items()} | dict(elsewhere or {})
    for tensor in external_tensors(model.graph):
        location, start = places[external_name(tensor)]
        start += external_offset(tensor)
        size = stored_bytes(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), tensor.dims)
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", str(start)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
