"""A calibration that survives an interruption: the results of each finished layer are kept in a folder until all are finished.

For every finished layer, the folder holds its part of calibration.json and of the statistics. It also holds the hidden states
with which the next layer begins. The first line of ``journal.jsonl`` describes the calibration. Each further line lists the files
of one layer with their hashes; a layer without a line does not count. A run that continues verifies every file.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from rq_compile.calibration.schema import DenseCalibration, LayerCalibration
from rq_compile.calibration.scratch import on_disk
from rq_compile.calibration.statistics import write_statistics
from rq_compile.checkpoint.safetensors_file import tensors_of
from rq_compile.errors import UserError
from rq_compile.file_systems import lock, sync
from rq_compile.files import Document, sha256
from rq_compile.processes import rank

Job = dict[str, Any]
Say = Callable[[str], None]
DENSE = TypeAdapter(list[DenseCalibration])


class Finished(Document):
    """A line of the journal: a layer, the sha256 of its files by name, and that of the states, which only the last layer has."""

    layer: str
    files: dict[str, str]
    states: str


class InProcess:
    """Finished layers that are kept in the process only. Without ``moments``, the statistics are not needed."""

    def __init__(self, moments: bool = True) -> None:
        self.layers: list[LayerCalibration] = []
        self.dense: list[DenseCalibration] = []
        self._moments = moments
        self._statistics: dict[str, np.ndarray] = {}

    def take_up(self, job: Job) -> None:
        """Does nothing, because nothing is left of an earlier run."""

    def add(
        self, layer: LayerCalibration, statistics: dict[str, np.ndarray], states: Any, dense: Sequence[DenseCalibration] = ()
    ) -> None:
        self.layers.append(layer)
        self.dense += dense
        if self._moments:
            self._statistics |= {name: on_disk(moment) for name, moment in statistics.items()}

    def states(self) -> Any:
        return None

    def statistics(self) -> dict[str, np.ndarray]:
        return self._statistics


class Unfinished:
    """The finished ``layers`` in ``folder``, which ``take_up`` creates."""

    def __init__(self, folder: Path, fresh: bool, say: Say) -> None:
        self.folder, self.layers = folder, list[LayerCalibration]()
        self.dense: list[DenseCalibration] = []
        self._fresh, self._say = fresh, say
        self._journal = folder / "journal.jsonl"
        self._records: list[Finished] = []
        self._lock: int | None = None

    def take_up(self, job: Job) -> None:
        """Load the finished layers of the same job, if all files are unchanged.

        Raises:
            UserError: another process calibrates for the same output, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            lock(self._lock, self.folder / "lock")
        except BlockingIOError:
            self.close()
            raise UserError(f"another rq-compile writes {self.folder}; wait for it or choose another output with -o", 2) from None
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}; choose another output with -o", 2) from error
        self._records = [] if self._fresh else self._left_of(json.dumps(job))
        if self._records:
            self.layers = [
                LayerCalibration.model_validate_json((self.folder / f"{number}.json").read_bytes())
                for number in range(len(self._records))
            ]
            for number in range(len(self._records)):
                self.dense += DENSE.validate_json((self.folder / f"{number}.dense.json").read_bytes())
            self._say(f"continuing after {self._records[-1].layer}, which is finished")
        else:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        # Drop a line that was cut off, to which the next would be appended.
        lines = (json.dumps(job), *(record.model_dump_json() for record in self._records))
        self._journal.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _left_of(self, job: str) -> list[Finished]:
        lines = self._journal.read_text(encoding="utf-8", errors="replace").splitlines() if self._journal.exists() else []
        if lines and lines[0] != job:
            self._say(f"{self.folder} is of another calibration (other texts, options, model or version); starting over")
        records: list[Finished] = []
        for line in lines[1:] if lines and lines[0] == job else []:
            try:
                records.append(Finished.model_validate_json(line))
            except ValidationError:
                break  # cut off
        if records and not self._intact(records):
            self._say(f"the files in {self.folder} differ from what was written; starting over")
            return []
        return records

    def _intact(self, records: list[Finished]) -> bool:
        files = [pair for record in records for pair in record.files.items()]
        files.append((f"states.{len(records) - 1}.pt", records[-1].states))
        return all((self.folder / name).is_file() and sha256(self.folder / name) == digest for name, digest in files)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def begun(self) -> bool:
        return self._lock is not None

    def add(
        self, layer: LayerCalibration, statistics: dict[str, np.ndarray], states: Any, dense: Sequence[DenseCalibration] = ()
    ) -> None:
        """Add a finished layer, and the non-expert modules that were measured since the one before. ``states``: tensors, tuples,
        lists and dictionaries with which the next layer begins.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._add(layer, statistics, states, dense)
        except OSError as error:
            raise UserError(
                f"cannot keep the measurements of {layer.name} in {self.folder}: {error.strerror or error}; "
                "free space there or choose another output with -o"
            ) from error

    def _add(
        self, layer: LayerCalibration, statistics: dict[str, np.ndarray], states: Any, dense: Sequence[DenseCalibration]
    ) -> None:
        number = len(self.layers)
        names = [f"{number}.json", f"{number}.dense.json", *([f"{number}.safetensors"] if statistics else [])]
        (self.folder / names[0]).write_text(layer.model_dump_json(), encoding="utf-8")
        (self.folder / names[1]).write_bytes(DENSE.dump_json(list(dense)))
        if statistics:
            write_statistics(statistics, self.folder / names[2])
        kept = self.folder / f"states.{number}.pt"
        torch.save(states, kept)
        for path in (*(self.folder / name for name in names), kept):
            sync(path)
        record = Finished(layer=layer.name, files={name: sha256(self.folder / name) for name in names}, states=sha256(kept))
        with self._journal.open("a", encoding="utf-8") as lines:
            lines.write(record.model_dump_json() + "\n")
        sync(self._journal)
        (self.folder / f"states.{number - 1}.pt").unlink(missing_ok=True)
        self.layers.append(layer)
        self.dense += dense
        self._records.append(record)

    def states(self) -> Any:
        """The states of the last finished layer, mapped from the disk; None if there is no finished layer."""
        if not self.layers:
            return None
        return torch.load(self.folder / f"states.{len(self.layers) - 1}.pt", mmap=True, weights_only=True)

    def statistics(self) -> dict[str, np.ndarray]:
        """The statistics of all finished layers, mapped from the disk."""
        found: dict[str, np.ndarray] = {}
        for number in range(len(self.layers)):
            path = self.folder / f"{number}.safetensors"
            if path.exists():
                found |= {
                    name: np.memmap(path, np.float32, "r", offset=tensor.offset, shape=tensor.shape)
                    for name, tensor in tensors_of(path).items()
                }
        return found


@contextmanager
def unfinished(output: Path, *, fresh: bool = False, say: Say = lambda text: None) -> Iterator[Unfinished | InProcess]:
    """The finished layers of an earlier run for ``output``, unless ``fresh``. After success, the folder is removed; after a
    failure or an interruption, it stays if a layer is finished. ``say`` takes a sentence for the user. With several processes,
    only the first keeps anything.
    """
    if rank() > 0:
        yield InProcess(moments=False)
        return
    found = Unfinished(output.with_name(f".{output.name}.partial"), fresh, say)
    try:
        yield found
    except BaseException:
        if found.begun and found.layers:
            say(f"{found.folder} holds the finished part; the same command continues from there, or starts over with --fresh")
        elif found.begun:
            shutil.rmtree(found.folder, ignore_errors=True)
        raise
    else:
        if found.begun:
            shutil.rmtree(found.folder, ignore_errors=True)
    finally:
        found.close()
